"""Yes/no questions about objects in images, half of them about absent objects (POPE, Li et al. 2023)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mmphi.data.phrasing import training_phrasing
from mmphi.data.scenes import KINDS
from mmphi.data.schema import Example, ImageRef, Turn
from mmphi.evaluation.object_vocabulary import mentioned_objects, plausible_objects
from mmphi.evaluation.ptb_tokenize import ptb_tokens


@dataclass(frozen=True)
class Question:
    """A question about an image with its correct answer, yes or no."""

    image: ImageRef
    text: str
    answer: bool


def yes_no_questions(examples: Sequence[Example], count: int, seed: int) -> list[Question]:
    """Return questions about the images of examples, half with the answer yes and half with no.

    Scenes: questions about a shape of some color; absent ones share a color or shape with one in the scene. Captioned
    photos: questions about objects in the captions; absent ones are drawn from the objects most frequent in all
    captions (POPE's *popular*), except those that a caption of this image mentions or implies: a man is a person.

    Args:
        examples: Examples with captions or attributes; those of one image are combined.
        count: Number of questions.
        seed: Seed of the selection.
    """
    rng = random.Random(seed)
    present, absent, images = _things(examples)
    able = sorted(i for i in images if present[i] and absent[i])
    if not able:
        return []
    questions = []
    for number in range(count // 2):
        image = able[number % len(able)]
        for things, answer in ((present[image], True), (absent[image], False)):
            questions.append(Question(images[image], _question(rng.choice(things)), answer))
    return questions


def _question(thing: str) -> str:
    return f"is there {'an' if thing[0] in 'aeiou' else 'a'} {thing}?"


def conversations(examples: Sequence[Example], per_image: int, seed: int, *, varied: bool = False) -> list[Example]:
    """Return yes/no questions as training conversations, one per image, half of the questions with the answer yes.

    Present and absent objects are found as in :func:`yes_no_questions`, from these examples only. Call it for each
    split separately, to avoid leakage between splits.

    Args:
        examples: Examples with captions or attributes; those of one image are combined.
        per_image: Largest number of questions per image; fewer if an image has too few present or absent objects.
        seed: Seed of the selection.
        varied: Whether to use several phrasings with varied case and punctuation, in place of one.

    Returns:
        Conversations of the kind ``yes_no``; images without known objects have none.
    """
    present, absent, images = _things(examples)
    first = {e.image.id: e for e in examples if e.image is not None}
    rng, phrasing_rng, made = random.Random(seed), random.Random(f"phrasings {seed}"), []
    for name, image in images.items():
        count = min(per_image // 2, len(present[name]), len(absent[name]))
        things = [(thing, "yes") for thing in rng.sample(present[name], count)]
        things += [(thing, "no") for thing in rng.sample(absent[name], count)]
        rng.shuffle(things)
        texts = [_question(thing) for thing, _ in things]
        if varied:
            texts = [training_phrasing(text, phrasing_rng) for text in texts]
        turns = tuple(Turn(text, answer) for text, (_, answer) in zip(texts, things, strict=True))
        if turns:
            of, attributes = first[name], {"kind": "yes_no"}
            made.append(Example(f"{name}-yes_no", (image,), turns, of.source, of.split, attributes))
    return made


Things = tuple[dict[str, list[str]], dict[str, list[str]], dict[str, ImageRef]]


def _things(examples: Sequence[Example]) -> Things:
    """Present and absent objects of each image, and the images, by the image's name."""
    scenes = {e.image.id for e in examples if e.image is not None and "shape1" in e.attributes}
    drawn = _scene_things([e for e in examples if e.image is not None and e.image.id in scenes])
    photos = _photo_things([e for e in examples if e.image is not None and e.image.id not in scenes])
    return drawn[0] | photos[0], drawn[1] | photos[1], drawn[2] | photos[2]


def _scene_things(examples: Sequence[Example]) -> Things:
    images = {e.image.id: e.image for e in examples if e.image is not None and "shape1" in e.attributes}
    drawn = {e.image.id: e.attributes for e in examples if e.image is not None and "shape1" in e.attributes}
    present = {i: [f"{a['color1']} {a['shape1']}", f"{a['color2']} {a['shape2']}"] for i, a in drawn.items()}
    absent = {
        i: [k for k in KINDS if k not in there and set(k.split()) & set(" ".join(there).split())]
        for i, there in present.items()
    }
    return present, absent, images


def _photo_things(examples: Sequence[Example]) -> Things:
    images = {e.image.id: e.image for e in examples if e.image is not None}
    shown: dict[str, set[str]] = {i: set() for i in images}
    for example in examples:
        if example.image is not None:
            for turn in example.turns:
                shown[example.image.id] |= mentioned_objects(ptb_tokens(turn.answer))
    popular = [thing for thing, _ in Counter(t for things in shown.values() for t in sorted(things)).most_common(30)]
    present = {i: sorted(things) for i, things in shown.items()}
    absent = {i: [t for t in popular if t not in plausible_objects(things)] for i, things in shown.items()}
    return present, absent, images


def score_yes_no(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Return accuracy, F1 of yes and the share of yes; answers that do not begin with yes count as no, as in POPE.

    Args:
        questions: Questions with their correct answers.
        answers: Generated answers.
    """
    answered_yes = [ptb_tokens(a)[:1] == ["yes"] for a in answers]
    pairs = list(zip((q.answer for q in questions), answered_yes, strict=True))
    hits = sum(want and got for want, got in pairs)
    wanted, affirmed = sum(want for want, _ in pairs), sum(answered_yes)
    return {
        "yes_no_accuracy": sum(want == got for want, got in pairs) / len(pairs),
        "yes_no_f1": 2 * hits / (wanted + affirmed) if wanted + affirmed else 0.0,
        "yes_no_share_of_yes": affirmed / len(pairs),
    }
