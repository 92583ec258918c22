from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import RandomFeatures, encode, example, tiny_language
from torch.nn import functional as F

from mmphi.errors import ModelError
from mmphi.models.packed_vlm import PackedVLM, block_causal_mask
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.text.packing import DOUBLE, cheapest_rows, pack, packs, partition
from mmphi.training.packed_dataset import PackedStepDataset

SOURCES = {"image": RandomFeatures()}
ANSWERS = ["a dog", "two men on a bench", "snow", "a cat sits", "the red bus turns left", "b" * 80, "it rains here"]


def make_samples(language):
    kinds = [example(i, a, "what?" if i % 2 else "", image=i % 3 != 0) for i, a in enumerate(ANSWERS)]
    return [encode(e, language.prompt, RandomFeatures.tokens, 200) for e in kinds]


def make_model(language):
    torch.manual_seed(1)
    return PackedVLM(language.model, image=Projector(ProjectorConfig(RandomFeatures.width, 32)))


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_partition_fills_every_row_evenly_and_loses_nothing():
    lengths = [7, 1, 1, 1, 4, 3, 3, 2, 9, 5]
    rows = partition(lengths, 4)
    assert sorted(i for row in rows for i in row) == list(range(10))
    totals = [sum(lengths[i] for i in row) for row in rows]
    assert max(totals) - min(totals) <= 1
    assert partition([0, 0, 0], 3) == [[0], [1], [2]]
    with pytest.raises(ValueError, match="cannot fill"):
        partition([1], 2)


def work_of(lengths, rows, width=1024):
    length = max(sum(lengths[i] for i in row) for row in rows)
    return len(rows) * length * (1 + length / (DOUBLE * width))


@pytest.mark.parametrize("seed", range(12))
def test_no_number_of_rows_is_less_work(seed):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, (20, 200, 2000)[seed % 3], size=1 + seed * 3).tolist()
    for width in (64, 1024):
        rows = cheapest_rows(lengths, width)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        others = [work_of(lengths, partition(lengths, count), width) for count in range(1, len(lengths) + 1)]
        assert work_of(lengths, rows, width) == min(others)


def test_a_narrow_model_has_shorter_rows():
    """More of its work is attention, which costs the square of a row."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(26, 56, size=40).tolist()
    narrow, wide = (len(cheapest_rows(lengths, width)) for width in (64, 2048))
    assert narrow >= 2 * wide


def test_little_is_padding_at_llavas_lengths():
    """576 image tokens and conversations of 30 to 500 tokens: 16 sequences, none of which can share a short row."""
    draw = np.random.default_rng(0)
    waste = []
    for _ in range(20):
        lengths = (576 + np.clip(draw.lognormal(5.0, 0.7, size=16), 30, 500).astype(int)).tolist()
        rows = cheapest_rows(lengths)
        width = max(sum(lengths[i] for i in row) for row in rows)
        waste.append(1 - sum(lengths) / (len(rows) * width))
    assert np.mean(waste) < 0.1


def test_mask_lets_nothing_through_between_neighbours():
    mask = block_causal_mask(torch.tensor([[0, 0, 1, -1]]))[0, 0]
    assert mask.tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [False, False, True, False],
        [False, False, False, True],
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_loss_and_gradients_equal_unpacked(attention):
    language = tiny_language(attn_implementation=attention)
    model, samples, features = make_model(language), make_samples(language), SOURCES
    packed = pack(samples, features)
    assert packed["input_ids"].shape[0] < len(samples)
    whole = model(**packed)
    whole.backward()
    together = gradients(model)
    singles = [model(**pack([s], features)) for s in samples]
    sum(singles).backward()
    torch.testing.assert_close(whole, sum(singles), rtol=1e-5, atol=1e-5)
    alone = gradients(model)
    assert together.keys() == alone.keys()
    assert together
    for name in together:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-4, atol=1e-5)


def test_loss_equals_the_models_own_with_all_logits():
    language = tiny_language()
    model, features = make_model(language), SOURCES
    for sample in make_samples(language):
        rows = pack([sample], features)
        embeddings = model.embed(rows["input_ids"], rows["features"], rows["places"])
        labels = torch.where(torch.from_numpy(sample.supervised), rows["input_ids"][0], -100)[None]
        reference = language.model(inputs_embeds=embeddings, labels=labels).loss
        mean = model(**rows) / len(rows["targets"])
        torch.testing.assert_close(mean, reference, rtol=1e-5, atol=1e-6)


def test_targets_are_shifted_once():
    language = tiny_language()
    sample = encode(example(0, "ab", image=False), language.prompt, 0, 50)
    rows = pack([sample], {})
    end = language.tokenizer.eos_token_id
    assert language.tokenizer.decode(rows["targets"].tolist()[:2]) == "ab"
    assert rows["targets"].tolist()[-1] == end
    assert rows["keep"].tolist() == [0, 1, 2]  # predicted from BOS, a, b


def test_features_stand_in_their_own_places():
    language = tiny_language()
    model, samples, features = make_model(language), make_samples(language), SOURCES
    rows = pack(samples, features)
    embedded = model.embed(rows["input_ids"], rows["features"], rows["places"])
    for sample in [s for s in samples if s.spans]:
        (span,) = sample.spans
        alone = model.projectors["image"](RandomFeatures().rows([span.reference]))
        hits = [
            (r, c)
            for r in range(embedded.shape[0])
            for c in range(embedded.shape[1] - 3)
            if torch.equal(embedded[r, c : c + 4], alone)
        ]
        assert len(hits) == 1
        (r, c) = hits[0]
        assert r * embedded.shape[1] + c in rows["places"]["image"].tolist()
        place = c - span.start
        ids = rows["input_ids"][r, place : place + len(sample)].numpy()
        np.testing.assert_array_equal(ids, sample.input_ids)


def test_wrong_number_of_places_names_the_sample():
    language = tiny_language()
    sample = encode(example(3, "x"), language.prompt, 5, 50)
    with pytest.raises(ModelError, match=r"photos/3: a span of 5 positions for an image with 4 features"):
        pack([sample], SOURCES)


def test_steps_hold_the_same_samples_however_they_are_spread():
    language = tiny_language()
    samples = make_samples(language)
    few = PackedStepDataset(samples, SOURCES, steps=5, batch_size=4, packs_per_step=1, seed=3)
    many = PackedStepDataset(samples, SOURCES, steps=5, batch_size=4, packs_per_step=2, seed=3)
    assert len(many) == 10
    for step in range(5):
        whole, parts = few[step], [many[2 * step], many[2 * step + 1]]
        assert {float(p["step_tokens"]) for p in parts} == {float(whole["step_tokens"])}
        together = torch.cat([p["targets"] for p in parts]).sort().values
        assert torch.equal(together, whole["targets"].sort().values)
    seen = [s.name for step in range(7) for s in few.step(step)][: 4 * len(samples)]
    assert {seen.count(s.name) for s in samples} == {4}  # 28 places over 7 samples: each epoch sees each once


def test_packs_visit_every_sample_once_in_order():
    samples = make_samples(tiny_language())
    rows = list(packs(samples, SOURCES, max_tokens=90))
    assert len(rows) > 1
    assert sum(len(p["targets"]) for p in rows) == sum(int(s.supervised.sum()) for s in samples)
    assert all(p["input_ids"].numel() <= 200 for p in rows)


def test_no_loss_on_prompt_or_image():
    language = tiny_language()
    model, features = make_model(language), SOURCES
    sample = encode(example(1, "yes", "is it?"), language.prompt, 4, 60)
    rows = pack([sample], features)
    text = language.tokenizer.decode(rows["targets"].tolist()[:-1])
    assert text == "yes"
    logits = model.logits(rows)
    assert logits.shape == (4, 260)
    torch.testing.assert_close(F.cross_entropy(logits, rows["targets"], reduction="sum"), model(**rows))
