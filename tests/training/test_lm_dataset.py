from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import byte_tokenizer

from mmphi.data.text_sources import TextPiece
from mmphi.data.token_shards import ShardTokenizer, TokenShards
from mmphi.errors import DataError
from mmphi.training.lm_dataset import LMDataset, SourceScheduler

TEXTS = {"one": ["a cat sat", "b", "the dog ran far away" * 9], "two": ["xyz" * 50, "w", "v" * 41]}


def corpus(folder: Path, texts=TEXTS, apart=lambda *_: False) -> TokenShards:
    folder.mkdir(exist_ok=True)
    sources = {name: lambda own=own: [TextPiece(text, True, True) for text in own] for name, own in texts.items()}
    shards = ShardTokenizer(folder, sources, byte_tokenizer(), is_held_out=apart, say=lambda _: None)()
    return TokenShards(folder, [s.name for s in shards])


def steps(tokens: TokenShards, **changes) -> LMDataset:
    options = {"context": 16, "rows": 4, "passes": 1, "steps": 50, "seed": 0, **changes}
    return LMDataset(tokens, options.pop("weights", [0.0, 0.0]), **options)


def predicted(made: LMDataset, source: int, count: int) -> list[tuple[int, int]]:
    """Given and predicted ids of the first tokens of a source's rows."""
    rows = [made.row(i) for i in range(400) if made.turns[i][0] == source]
    pairs = itertools.chain.from_iterable(zip(r["input_ids"], r["targets"], strict=True) for r in rows)
    return [(int(a), int(b)) for a, b in itertools.islice(pairs, count)]


def test_every_token_is_predicted_once_an_epoch(tmp_path):
    tokens = corpus(tmp_path)
    made, end = steps(tokens), 256
    for source, texts in enumerate(TEXTS.values()):
        ids = [[end, *byte_tokenizer()(text)["input_ids"], end] for text in texts]
        wanted = Counter(pair for one in ids for pair in itertools.pairwise(one))
        total = made.streams[source].tokens
        assert total == wanted.total()
        seen = predicted(made, source, 2 * total)
        assert Counter(seen[:total]) == wanted
        assert Counter(seen[total:]) == wanted
        assert seen[:total] != seen[total:]  # In another order.


def test_order_follows_seed_and_step_alone(tmp_path):
    tokens = corpus(tmp_path)
    one, again, other = steps(tokens), steps(tokens), steps(tokens, seed=1)
    late = again[17]["input_ids"]  # Asked for first, as after a resume.
    assert torch.equal(one[17]["input_ids"], late)
    assert any(not torch.equal(one[i]["input_ids"], other[i]["input_ids"]) for i in range(3))


@pytest.mark.parametrize("passes", [2, 4])
def test_a_step_has_the_same_rows_however_many_passes(tmp_path, passes):
    tokens = corpus(tmp_path)
    whole, spread = steps(tokens), steps(tokens, passes=passes)
    for step in range(3):
        parts = [spread[step * passes + i] for i in range(passes)]
        assert torch.equal(whole[step]["input_ids"], torch.cat([p["input_ids"] for p in parts]))
        assert {float(p["step_tokens"]) for p in parts} == {float(whole[step]["step_tokens"])} == {64.0}


def test_walls_and_positions(tmp_path):
    for index in range(5):
        batch = steps(corpus(tmp_path))[index]
        starts = batch["borders"].tolist()
        assert starts[0] == 0
        assert starts[-1] == batch["input_ids"].numel()
        positions, segments = batch["position_ids"].flatten(), batch["segments"].flatten()
        for a, b in itertools.pairwise(starts):
            assert positions[a:b].tolist() == list(range(b - a))
            assert len(set(segments[a:b].tolist())) == 1
        assert set(range(0, 64, 16)) <= set(starts)  # No document crosses rows.


def test_weights_are_kept_at_any_moment(tmp_path):
    turns = SourceScheduler([3, 1, 2])
    sources = [turns[i][0] for i in range(600)]
    for upto in (6, 60, 600):
        counts = np.bincount(sources[:upto], minlength=3)
        assert np.abs(counts - np.asarray([3, 1, 2]) / 6 * upto).max() <= 1
    assert [turns[i][1] for i in range(600) if sources[i] == 0] == list(range(sources.count(0)))
    tokens = corpus(tmp_path)
    made = steps(tokens, weights=[1.0, 3.0])
    assert [made.turns[i][0] for i in range(40)].count(1) == 30


def test_what_is_kept_apart_is_not_trained_on(tmp_path):
    tokens = corpus(tmp_path, apart=lambda source, piece, place: piece == 0)
    ids = tokens.ids(int(tokens.of(0, validation=True)[0]))
    assert byte_tokenizer().decode(ids[1:-1]) == "a cat sat"
    seen = predicted(steps(tokens), 0, 1000)
    assert (ord("c") - ord("!"), ord("a") - ord("!")) not in seen


def test_rows_that_cannot_be_spread(tmp_path):
    tokens = corpus(tmp_path)
    with pytest.raises(ValueError, match="4 rows"):
        steps(tokens, passes=3)
    with pytest.raises(DataError, match="no training tokens"):
        steps(corpus(tmp_path / "none", apart=lambda source, *_: source == 1))
