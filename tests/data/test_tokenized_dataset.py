from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builders import byte_tokenizer, encode, example, of_length

from mmphi.data import tokenized_dataset as module
from mmphi.data.schema import Example, ImageRef, ReadReport, Turn
from mmphi.data.tokenized_dataset import Subset, append_array, count_left_out, tokenized_examples
from mmphi.text.prompt import Prompt


@pytest.fixture
def examples(tmp_path) -> list[Example]:
    two = tuple(ImageRef(name, tmp_path / name) for name in "ab")
    rows = [example(i, f"answer {i}", "why?" if i % 2 else "", image=i % 3 != 0) for i in range(12)]
    return [
        *rows,
        Example("many", two, (Turn("<image> or <image>?", "the first"),), "pairs"),
        example(99, "far too long " * 100),
        Example("cut", two, (Turn("one <image> " + "x" * 150, "a"), Turn("two <image>", "b")), "pairs"),
    ]


def same(one, other) -> bool:
    arrays = zip((one.input_ids, one.supervised), (other.input_ids, other.supervised), strict=True)
    return all(np.array_equal(a, b) for a, b in arrays) and (one.spans, one.name) == (other.spans, other.name)


def test_equals_encoding_one_by_one(tmp_path, examples):
    prompt = Prompt(byte_tokenizer(), "plain")
    sequences = tokenized_examples(examples, prompt, of_length(4), 120, tmp_path)
    expected = [s for s in (encode(e, prompt, 4, 120) for e in examples) if s is not None]
    assert len(sequences) == len(expected) == 14
    assert all(same(a, b) for a, b in zip(sequences, expected, strict=True))
    assert sequences.sources == [*["photos"] * 12, "pairs", "pairs"]
    assert [span.reference.id for span in sequences[-1].spans] == ["b"]
    report = ReadReport()
    count_left_out(sequences, examples, 120, report)
    assert [(d.where, d.reason) for d in report.dropped] == [("99", "over 120 tokens")]
    chosen = Subset(sequences, [3, 0, 3])
    assert [s.name for s in chosen] == ["photos/3", "photos/0", "photos/3"]


def test_is_encoded_once(tmp_path, examples, monkeypatch):
    first = tokenized_examples(examples, Prompt(byte_tokenizer(), "plain"), of_length(4), 120, tmp_path)
    monkeypatch.setattr(module, "tokenize_example", lambda *_: pytest.fail("was encoded again"))
    again = tokenized_examples(examples, Prompt(byte_tokenizer(), "plain"), of_length(4), 120, tmp_path)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    renamed = [Example(e.id, e.images, e.turns, "elsewhere") for e in examples]
    assert (
        tokenized_examples(renamed, Prompt(byte_tokenizer(), "plain"), of_length(4), 120, tmp_path)[0].name
        == "elsewhere/0"
    )


@pytest.mark.parametrize("change", ["style", "length", "features", "text", "tokenizer"])
def test_is_encoded_anew_where_anything_differs(tmp_path, examples, change):
    tokenizer = byte_tokenizer()
    tokenized_examples(examples, Prompt(tokenizer, "plain"), of_length(4), 120, tmp_path)
    if change == "text":
        examples[0] = example(0, "another answer", image=False)
    if change == "tokenizer":
        tokenizer.add_tokens(["answer"])
    tokenized_examples(
        examples,
        Prompt(tokenizer, "phi" if change == "style" else "plain"),
        of_length(5 if change == "features" else 4),
        121 if change == "length" else 120,
        tmp_path,
    )
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


def test_text_alone(tmp_path):
    sequences = tokenized_examples(
        [example(0, "a", image=False)], Prompt(byte_tokenizer(), "plain"), of_length(4), 50, tmp_path
    )
    assert sequences[0].spans == ()


def test_a_file_written_piece_by_piece_is_numpys_own(tmp_path: Path) -> None:
    pieces = [np.arange(5, dtype=np.int32), np.zeros(0, np.int32), np.arange(7, dtype=np.int32)]
    with append_array(tmp_path / "pieces.npy", np.int32) as add:
        for piece in pieces:
            add(piece)
    np.save(tmp_path / "whole.npy", np.concatenate(pieces))
    assert (tmp_path / "pieces.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["pieces.npy", "whole.npy"]
    with append_array(tmp_path / "none.npy", np.bool_):
        pass
    assert np.load(tmp_path / "none.npy", mmap_mode=None).shape == (0,)
