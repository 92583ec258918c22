"""Scenes as text: captions, questions and answers, and a grid of words that replaces the image.

A language model pretrained on captions alone learns to ignore the context before them, and later recites captions
regardless of the image. A scene is therefore also written as a grid of words, one per cell, at the position of the
image, and the caption that follows can be predicted from the grid only.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from mmphi.data.phrasing import DESCRIBE, WHICH_COLORS, WHICH_SHAPES
from mmphi.data.scenes import COLORS, KINDS, OPPOSITE, SHAPES, Combination, Scene, Thing, scenes
from mmphi.data.schema import Turn

CELLS = 4
SMALL_CELLS, BIG_CELLS = 2, 4
EMPTY = "."


@dataclass(frozen=True)
class SceneText:
    """A grid of words and a conversation about it."""

    context: str
    turns: tuple[Turn, ...]


def caption(scene: Scene) -> str:
    """Returns the only correct caption of a scene."""
    return f"a big {scene.big.kind} {scene.relation} a small {scene.small.kind}"


def shapes(scene: Scene) -> str:
    """Returns the shapes and their relation, without colors, so that colors cannot serve as a shortcut."""
    return f"a big {scene.big.shape} {scene.relation} a small {scene.small.shape}"


def colors(scene: Scene) -> str:
    """Returns the colors and their relation, without shapes."""
    return f"a big {scene.big.color} shape {scene.relation} a small {scene.small.color} shape"


def questions(scene: Scene, count: int, rng: random.Random) -> tuple[Turn, ...]:
    """Returns different questions about a scene with short answers; yes and no are equally likely."""
    sizes = {"big": scene.big, "small": scene.small}
    pool = []
    for size, thing in sizes.items():
        pool.append(Turn(f"what color is the {size} shape?", thing.color))
        pool.append(Turn(f"what shape is the {size} one?", thing.shape))
    pool += [Turn(WHICH_SHAPES, shapes(scene)), Turn(WHICH_COLORS, colors(scene))]
    pool.append(Turn(f"where is the {scene.big.kind}?", f"{scene.relation} the {scene.small.kind}"))
    pool.append(Turn(f"where is the {scene.small.kind}?", f"{OPPOSITE[scene.relation]} the {scene.big.kind}"))
    pool = rng.sample(pool, min(len(pool), max(0, count - 1)))
    return tuple([*pool, yes_no(scene, rng)][:count])


def yes_no(scene: Scene, rng: random.Random) -> Turn:
    """Returns a question about the presence of a thing, present in half of the cases.

    An absent thing shares its color or its shape with a present one.
    """
    present = {scene.big.kind, scene.small.kind}
    if rng.random() < 0.5:
        return Turn(f"is there a {rng.choice(sorted(present))}?", "yes")
    words = {word for kind in present for word in kind.split()}
    absent = [k for k in KINDS if k not in present and words & set(k.split())]
    return Turn(f"is there a {rng.choice(absent)}?", "no")


def yes_no_questions(scene: Scene, count: int, rng: random.Random) -> tuple[Turn, ...]:
    """Returns yes/no questions about a scene: half about a color or a shape alone, half about both together.

    A question about both gives one bit per example, from which a small model learns nothing: it always answers "no".
    Questions about a color or a shape alone are learned first, and combinations after them.
    """
    things = scene.big, scene.small
    turns = []
    for _ in range(count):
        kind = rng.choice(("color", "shape", "both", "both"))
        if kind == "both":
            turns.append(yes_no(scene, rng))
            continue
        present = sorted({getattr(thing, kind) for thing in things})
        absent = [word for word in (COLORS if kind == "color" else SHAPES) if word not in present]
        there = rng.random() < 0.5
        word = rng.choice(present if there else absent)
        turns.append(Turn(f"is there a {word}{' shape' if kind == 'color' else ''}?", "yes" if there else "no"))
    return tuple(turns)


def grid(scene: Scene, rng: random.Random) -> str:
    """Returns the scene as ``CELLS`` x ``CELLS`` words, row by row.

    The cells that a thing covers contain its color or its shape, in random order; their number encodes its size.
    """
    cells = [EMPTY] * (CELLS * CELLS)
    taken: list[int] = []
    for thing, count in ((scene.small, SMALL_CELLS), (scene.big, BIG_CELLS)):
        covered = _nearest(thing, count, taken)
        taken += covered
        words = [thing.color, thing.shape] * (count // 2)
        rng.shuffle(words)
        for cell, word in zip(covered, words, strict=True):
            cells[cell] = word
    return "".join(f" {word}" for word in cells)


def _nearest(thing: Thing, count: int, taken: list[int]) -> list[int]:
    """The free cells nearest to the center of a thing."""
    centres = [((i % CELLS + 0.5) / CELLS, (i // CELLS + 0.5) / CELLS) for i in range(CELLS * CELLS)]
    free = [i for i in range(len(centres)) if i not in taken]
    return sorted(free, key=lambda i: math.dist(centres[i], (thing.x, thing.y)))[:count]


def corpus_texts(count: int, turns: int, rng: random.Random, among: list[Combination]) -> Iterator[SceneText]:
    """Yields texts about scenes: of twenty, nine are captions, four are questions and seven are yes/no questions.

    Args:
        count: Number of texts.
        turns: Questions per conversation, twice as many for yes/no questions; 0 for captions only.
        rng: Random number generator.
        among: Combinations to draw from.
    """
    for i, scene in enumerate(scenes(count, rng, among)):
        conversation: tuple[Turn, ...] = (Turn(DESCRIBE, caption(scene)),)
        if turns and i % 20 >= 9:
            plain = i % 20 < 13
            conversation = questions(scene, turns, rng) if plain else yes_no_questions(scene, 2 * turns, rng)
        yield SceneText(grid(scene, rng), conversation)
