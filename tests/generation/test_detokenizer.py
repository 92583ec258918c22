from __future__ import annotations

from collections import Counter

import pytest
import torch
from builders import byte_tokenizer

from mmphi.generation.detokenizer import IncrementalDetokenizer
from mmphi.generation.sampling import SamplingParams, TokenSampler


def said(text: str, *stop: str) -> tuple[list[str], bool]:
    """The pieces that come out as the bytes of a text go in, and whether a text to stop at was met."""
    tokenizer = byte_tokenizer()
    words, pieces, stopped = IncrementalDetokenizer(tokenizer, stop), [], False
    for token in tokenizer(text)["input_ids"]:
        stopped = words.add(token)
        pieces.append(words.take())
        if stopped:
            break
    words.finish()
    pieces.append(words.take())
    assert "".join(pieces) == words.text
    return [piece for piece in pieces if piece], stopped


@pytest.mark.parametrize("text", ["a red square", "naïve café", "日本語 ✓", "🙂🙂", ""])
def test_letters_come_whole_and_in_order(text: str) -> None:
    pieces, stopped = said(text)
    assert "".join(pieces) == text
    assert not stopped
    assert not any("\ufffd" in piece for piece in pieces)


def test_space_around_an_answer_is_none_of_it() -> None:
    pieces, _ = said("  two  words \n")
    assert "".join(pieces) == "two  words"


def test_a_text_to_stop_at_is_not_given_out_by_halves() -> None:
    assert said("one\n\nQ: two", "\n\nQ:") == (list("one"), True)
    assert "".join(said("one\n\nR: two", "\n\nQ:")[0]) == "one\n\nR: two"
    assert "".join(said("abcd and abc", "abcde")[0]) == "abcd and abc"
    assert "".join(said("first END second STOP", "STOP", "END")[0]) == "first"


def test_half_a_letter_at_the_end_is_given_out_as_such() -> None:
    tokenizer = byte_tokenizer()
    words = IncrementalDetokenizer(tokenizer)
    for token in tokenizer("a🙂")["input_ids"][:3]:
        words.add(token)
    words.finish()
    assert words.text.startswith("a")


def drawn(sampling: SamplingParams, logits: torch.Tensor, count: int = 4000) -> Counter[int]:
    chooser = TokenSampler(sampling)
    return Counter(chooser.next(logits) for _ in range(count))


def test_tokens_are_drawn_as_likely_as_they_are() -> None:
    odds = torch.tensor([0.5, 0.3, 0.15, 0.05])
    found = drawn(SamplingParams(temperature=1.0, seed=0), odds.log())
    assert all(abs(found[i] / 4000 - float(p)) < 0.03 for i, p in enumerate(odds))
    cooler = (odds**2 / (odds**2).sum()).tolist()
    found = drawn(SamplingParams(temperature=0.5, seed=0), odds.log())
    assert all(abs(found[i] / 4000 - p) < 0.03 for i, p in enumerate(cooler))


def test_only_the_likeliest_share_is_drawn_from() -> None:
    odds = torch.tensor([0.05, 0.5, 0.3, 0.15])
    assert set(drawn(SamplingParams(temperature=1.0, top_p=0.4, seed=0), odds.log())) == {1}
    assert set(drawn(SamplingParams(temperature=1.0, top_p=0.6, seed=0), odds.log())) == {1, 2}
    assert set(drawn(SamplingParams(temperature=1.0, top_p=1.0, seed=0), odds.log())) == {0, 1, 2, 3}
    assert set(drawn(SamplingParams(), odds.log())) == {1}
