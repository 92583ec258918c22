"""Yes/no questions about what an image shows, half of them about what it does not (POPE, Li et al. 2023)."""

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
    """A question about an image whose answer is yes or no."""

    image: ImageRef
    text: str
    answer: bool


def yes_no_questions(examples: Sequence[Example], count: int, seed: int) -> list[Question]:
    """Questions about the images of examples, as many with yes as with no.

    About scenes: is a thing of some color and shape there; the absent ones share a color or shape with one that is.
    About captioned photos: is a thing there that a caption names; the absent ones are drawn from the things that the
    captions of all images name most often (POPE's *popular*), without those that any caption of this image names or
    leaves possible: where a man is, a person is.

    Args:
        examples: Examples with captions or attributes; several of one image are put together.
        count: How many questions.
        seed: Seed of the choice.
    """
    rng = random.Random(seed)
    present, absent, images = _scene_things(examples) if _are_scenes(examples) else _photo_things(examples)
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
    """Yes/no questions as conversations to learn from, one of every image, half of its questions with yes.

    What is there and what is not are found as in :func:`yes_no_questions`, among these examples alone. Call it for each
    split separately, so that nothing of another split is learned.

    Args:
        examples: With captions or attributes; several of one image are put together.
        per_image: Questions of an image, at most; an image with fewer things that are or are not there has fewer.
        seed: Seed of the choice.
        varied: Ask in several phrasings with varied case and punctuation, in place of one.

    Returns:
        Conversations of the kind ``yes_no``; none of images of which nothing is known.
    """
    present, absent, images = _scene_things(examples) if _are_scenes(examples) else _photo_things(examples)
    first = {e.image.id: e for e in examples if e.image is not None}
    rng, phrasing_rng, made = random.Random(seed), random.Random(f"phrasings {seed}"), []
    for name, image in images.items():
        count = min(per_image // 2, len(present[name]), len(absent[name]))
        asked = [(thing, "yes") for thing in rng.sample(present[name], count)]
        asked += [(thing, "no") for thing in rng.sample(absent[name], count)]
        rng.shuffle(asked)
        texts = [_question(thing) for thing, _ in asked]
        if varied:
            texts = [training_phrasing(text, phrasing_rng) for text in texts]
        turns = tuple(Turn(text, answer) for text, (_, answer) in zip(texts, asked, strict=True))
        if turns:
            of, attributes = first[name], {"kind": "yes_no"}
            made.append(Example(f"{name}-yes_no", (image,), turns, of.source, of.split, attributes))
    return made


Things = tuple[dict[str, list[str]], dict[str, list[str]], dict[str, ImageRef]]


def _are_scenes(examples: Sequence[Example]) -> bool:
    return any("shape1" in e.attributes for e in examples)


def _scene_things(examples: Sequence[Example]) -> Things:
    images = {e.image.id: e.image for e in examples if e.image is not None and e.attributes}
    drawn = {e.image.id: e.attributes for e in examples if e.image is not None and e.attributes}
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
    """Accuracy, F1 of yes, and the share of yes; an answer that begins with neither word counts as no, as POPE does.

    Args:
        questions: What was asked.
        answers: What was said.
    """
    said = [ptb_tokens(a)[:1] == ["yes"] for a in answers]
    pairs = list(zip((q.answer for q in questions), said, strict=True))
    hits = sum(want and got for want, got in pairs)
    wanted, affirmed = sum(want for want, _ in pairs), sum(said)
    return {
        "yes_no_accuracy": sum(want == got for want, got in pairs) / len(pairs),
        "yes_no_f1": 2 * hits / (wanted + affirmed) if wanted + affirmed else 0.0,
        "yes_no_share_of_yes": affirmed / len(pairs),
    }
