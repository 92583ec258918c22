from __future__ import annotations

from typing import Any

import pytest
from listening import listening

from mmphi.errors import ModelError
from mmphi.generation.messages import MessageError
from mmphi.models.multimodal import Multimodal


@pytest.fixture(scope="module")
def model() -> Multimodal:
    return listening()


def said(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


CASES = [
    said("what?"),
    said("who is it?", "a dog", "and then, after all of this?"),
    *(said("x" * n) for n in range(1, 11)),
]


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "seed": 3, "top_p": 0.9}])
def test_many_at_once_are_answered_as_one_after_the_other(model: Multimodal, how: dict[str, Any]) -> None:
    assert len(CASES) > 8  # More than there are places.
    found = model.chat_batch(CASES, max_tokens=9, **how)
    assert found == [model.chat(case, max_tokens=9, **how) for case in CASES]
    assert len(set(found)) > 4


def test_what_is_wrong_says_which_one_and_answers_none(model: Multimodal) -> None:
    with pytest.raises(MessageError, match=r"conversation 2, message 1: .*robot"):
        model.chat_batch([said("what?"), [{"role": "robot", "content": "x"}]])
    with pytest.raises(ModelError, match="room"):
        model.chat_batch([said("what?"), said("x" * 5000)])
    assert model.engine(1).busy == 0
    assert model.chat_batch([]) == []


def test_the_engine_grows_and_stays(model: Multimodal) -> None:
    first = model.engine(2)
    assert model.engine(1) is first
    assert model.engine(first.slots + 1) is not first
