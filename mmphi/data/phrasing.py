"""Several phrasings of each question that mmphi makes itself: some to train on, some held out for evaluation.

A model that is trained on one phrasing answers that phrasing only: "Describe the image" in place of
"describe the image." gets the answer of another question. So questions are trained in several wordings, with and
without a capital letter and final punctuation, and evaluated in wordings that no training contains.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

DESCRIBE = "describe the image."
WHICH_SHAPES = "what shapes are there?"
WHICH_COLORS = "what colors are there?"


@dataclass(frozen=True)
class Phrasings:
    """The wordings of one type of question.

    Attributes:
        canonical: The wording that data sets are written in; ``{}`` stands for the object or size it asks about.
        training: Other wordings to train on.
        held_out: Wordings for evaluation only.
    """

    canonical: str
    training: tuple[str, ...]
    held_out: tuple[str, ...]


ALL = (
    Phrasings(
        DESCRIBE,
        (
            "describe this picture.",
            "please describe the picture.",
            "what is this?",
            "what do you see?",
            "what is in the image?",
            "what does the picture show?",
        ),
        ("what is in this picture?", "please describe the image.", "what does the image show?"),
    ),
    Phrasings(
        WHICH_SHAPES,
        ("which shapes are there?", "what shapes do you see?", "what shapes are in the image?"),
        ("which shapes are in this picture?", "what shapes can you see?"),
    ),
    Phrasings(
        WHICH_COLORS,
        ("which colors are there?", "what colors do you see?", "what colors are in the image?"),
        ("which colors are in this picture?", "what colors can you see?"),
    ),
    Phrasings(
        "is there {a}?",
        ("is there {a} in the image?", "do you see {a}?", "can you see {a} here?", "does the picture show {a}?"),
        ("is there {a} in this picture?", "does the image show {a}?", "can you see {a} in the image?"),
    ),
    Phrasings(
        "what color is the {} shape?",
        ("which color is the {} shape?", "what color does the {} shape have?"),
        ("which color does the {} shape have?",),
    ),
    Phrasings(
        "what shape is the {} one?",
        ("which shape is the {} one?", "what is the shape of the {} one?"),
        ("what shape does the {} one have?",),
    ),
    Phrasings(
        "where is the {}?",
        ("where do you see the {}?", "where is the {} in the image?"),
        ("where in the image is the {}?",),
    ),
)


def _pattern(canonical: str) -> re.Pattern[str]:
    escaped = re.escape(canonical)
    return re.compile(escaped.replace(re.escape("{a}"), r"(an? .+)").replace(re.escape("{}"), "(.+)"))


_PATTERNS = [(_pattern(each.canonical), each) for each in ALL]


def match(question: str) -> tuple[Phrasings, str] | None:
    """The type of a question in its canonical wording, and what it asks about.

    Returns:
        None for a question of another origin.
    """
    for pattern, phrasings in _PATTERNS:
        found = pattern.fullmatch(question)
        if found:
            return phrasings, found[1] if found.groups() else ""
    return None


def _bare(question: str) -> str:
    return question.strip().rstrip("?.").lower()


_WORDINGS = [
    (_pattern(_bare(wording)), each) for each in ALL for wording in (each.canonical, *each.training, *each.held_out)
]


def canonical(question: str) -> str:
    """A question in its canonical wording; one of another origin is returned as it is.

    Args:
        question: In any of the wordings of :data:`ALL`, in any case, with or without final punctuation.
    """
    # The longest wording that matches: "is there a cat in the image" is not about "a cat in the image".
    matches = [(pattern.fullmatch(_bare(question)), each) for pattern, each in _WORDINGS]
    fits = [(found[1] if found.groups() else "", each) for found, each in matches if found]
    if not fits:
        return question
    about, phrasings = min(fits, key=lambda fit: len(fit[0]))
    return _filled(phrasings.canonical, about)


def typical_questions(questions: Iterable[str], most: int = 8) -> tuple[str, ...]:
    """The questions that a training asks most often, one of each type that mmphi makes itself.

    Args:
        questions: Every question of the training data.
        most: How many at most.

    Returns:
        The most frequent first; of a type with variable parts, its most frequent question.
    """
    by_type: dict[str, Counter[str]] = {}
    for question, count in Counter(questions).items():
        matched = match(canonical(question))
        by_type.setdefault(matched[0].canonical if matched else question, Counter())[question] += count
    ranked = sorted((each for each in by_type if each), key=lambda each: -by_type[each].total())
    # As they were asked, most often: a wording that no training has seen must not be shown as one.
    return tuple(by_type[each].most_common(1)[0][0] for each in ranked[:most])


def _filled(template: str, about: str) -> str:
    return template.replace("{a}", about).replace("{}", about)


def training_phrasing(question: str, rng: random.Random) -> str:
    """A question in one of its training phrasings, two in three in the canonical wording.

    One in four begins with a capital letter, and one in four has no final punctuation.

    Args:
        question: In its canonical wording; any other question keeps its words.
        rng: Source of the choice.
    """
    matched = match(question)
    if matched and rng.random() < 1 / 3:
        question = _filled(rng.choice(matched[0].training), matched[1])
    if rng.random() < 1 / 4:
        question = question[:1].upper() + question[1:]
    if rng.random() < 1 / 4 and question[-1:] in "?.":
        question = question[:-1]
    return question


def held_out_phrasing(question: str, rng: random.Random) -> str:
    """A question in one of the phrasings that no training contains, beginning with a capital letter.

    Args:
        question: In its canonical wording; any other question is returned as it is.
        rng: Source of the choice.
    """
    matched = match(question)
    if not matched:
        return question
    text = _filled(rng.choice(matched[0].held_out), matched[1])
    return text[:1].upper() + text[1:]
