from __future__ import annotations

import random
import re

import pytest

from mmphi.data.phrasing import ALL, canonical, held_out_phrasing, match, training_phrasing, typical_questions

QUESTIONS = (
    "describe the image.",
    "what shapes are there?",
    "what colors are there?",
    "is there a red circle?",
    "is there an apple?",
    "what color is the big shape?",
    "what shape is the small one?",
    "where is the red circle?",
)


def bare(question: str) -> str:
    return question.lower().rstrip("?.")


def test_training_and_held_out_phrasings_have_no_wording_in_common() -> None:
    for each in ALL:
        training = {bare(text) for text in (each.canonical, *each.training)}
        held_out = {bare(text) for text in each.held_out}
        assert held_out
        assert len(each.training) >= 2
        assert not training & held_out


@pytest.mark.parametrize("question", QUESTIONS)
def test_phrasings_keep_the_type_and_the_object_of_a_question(question: str) -> None:
    rng = random.Random(0)
    trained = [training_phrasing(question, rng) for _ in range(400)]
    held_out = [held_out_phrasing(question, rng) for _ in range(100)]
    assert {canonical(text) for text in [*trained, *held_out]} == {question}
    assert not {bare(text) for text in trained} & {bare(text) for text in held_out}
    assert len({bare(text) for text in trained}) >= 3
    assert 0.6 < sum(bare(text) == bare(question) for text in trained) / 400 < 0.74


def test_case_and_final_punctuation_vary() -> None:
    rng = random.Random(0)
    trained = [training_phrasing("is there a red circle?", rng) for _ in range(600)]
    assert 0.2 < sum(text[0].isupper() for text in trained) / 600 < 0.3
    assert 0.2 < sum(not re.search(r"[?.]$", text) for text in trained) / 600 < 0.3


def test_questions_of_other_origin_keep_their_words() -> None:
    question = "What is the man in the photo doing?"
    assert match(question) is None
    assert canonical(question) == question == held_out_phrasing(question, random.Random(0))
    assert {bare(training_phrasing(question, random.Random(i))) for i in range(20)} == {bare(question)}


def test_typical_questions_are_one_of_each_type_by_frequency() -> None:
    rng = random.Random(0)
    asked = [training_phrasing("is there a red circle?", rng) for _ in range(30)]
    asked += [training_phrasing("is there a blue cross?", rng) for _ in range(20)]
    asked += [training_phrasing("describe the image.", rng) for _ in range(40)] + ["", "What is funny here?"]
    assert typical_questions(asked) == ("is there a red circle?", "describe the image.", "What is funny here?")
    # A question of other origin is shown as it was asked, and never in a wording that no training has seen.
    assert typical_questions(["What is this?", "What is this?"]) == ("What is this?",)
    assert typical_questions(asked, most=1) == ("is there a red circle?",)
    assert typical_questions([]) == ()
