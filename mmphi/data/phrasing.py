"""Several phrasings of each question that mmphi generates: some for training, some held out for evaluation.

A model that is trained on one phrasing answers that phrasing only: "Describe the image" in place of
"describe the image." gets the answer of another question. Training therefore uses several wordings, with and without
a capital letter and final punctuation, and evaluation uses wordings that no training data contains.
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
        canonical: Wording in the data sets; ``{}`` or ``{a}`` is the placeholder of the object or size in question.
        training: Other wordings for training.
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
    """Match a question in canonical wording to its type.

    Returns:
        The wordings of the type and the object or size in question; ``None`` for a question that is not mmphi's.
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
    """Returns a question in its canonical wording; any other question is returned unchanged.

    Args:
        question: Any of the wordings in :data:`ALL`, in upper or lower case, with or without final punctuation.
    """
    # The longest wording that matches: "is there a cat in the image" is not about "a cat in the image".
    matches = [(pattern.fullmatch(_bare(question)), each) for pattern, each in _WORDINGS]
    fits = [(found[1] if found.groups() else "", each) for found, each in matches if found]
    if not fits:
        return question
    about, phrasings = min(fits, key=lambda fit: len(fit[0]))
    return _filled(phrasings.canonical, about)


def typical_questions(questions: Iterable[str], most: int = 8) -> tuple[str, ...]:
    """Returns the most frequent questions of training data, one for each type that mmphi generates.

    Args:
        questions: Every question of the training data.
        most: Maximum number of questions.

    Returns:
        Questions, the most frequent type first; for each type, its most frequent question.
    """
    by_type: dict[str, Counter[str]] = {}
    for question, count in Counter(questions).items():
        matched = match(canonical(question))
        by_type.setdefault(matched[0].canonical if matched else question, Counter())[question] += count
    ranked = sorted((each for each in by_type if each), key=lambda each: -by_type[each].total())
    # The most frequent wording in the data: users must not be offered a wording that training did not contain.
    return tuple(by_type[each].most_common(1)[0][0] for each in ranked[:most])


def _filled(template: str, about: str) -> str:
    return template.replace("{a}", about).replace("{}", about)


def training_phrasing(question: str, rng: random.Random) -> str:
    """Returns a question in a training phrasing; two in three keep the canonical wording.

    One in four begins with a capital letter, and one in four has no final punctuation.

    Args:
        question: Question in its canonical wording; any other question keeps its words.
        rng: Random number generator.
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
    """Returns a question in a held-out phrasing, which begins with a capital letter.

    Args:
        question: Question in its canonical wording; any other question is returned unchanged.
        rng: Random number generator.
    """
    matched = match(question)
    if not matched:
        return question
    text = _filled(rng.choice(matched[0].held_out), matched[1])
    return text[:1].upper() + text[1:]
