"""Scenes as words: captions, questions and answers, and a grid that can be read as a picture can be seen.

A language model pretrained on captions alone learns to ignore what stands before them: whatever it is shown later, it
recites. So a scene is also written as a grid of words, one a cell, in the place where its image will stand, and the
caption that follows can only be known by reading it.
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
    """The one right caption."""
    return f"a big {scene.big.kind} {scene.relation} a small {scene.small.kind}"


def shapes(scene: Scene) -> str:
    """What the shapes are and how they stand: a caption that says no color, so that none can be leaned on."""
    return f"a big {scene.big.shape} {scene.relation} a small {scene.small.shape}"


def colors(scene: Scene) -> str:
    """What the colors are and how they stand, with no shape said."""
    return f"a big {scene.big.color} shape {scene.relation} a small {scene.small.color} shape"


def questions(scene: Scene, count: int, rng: random.Random) -> tuple[Turn, ...]:
    """Different questions about a scene, with short answers; yes and no are equally likely."""
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
    """Whether a thing is there; half of the time it is. A thing that is not there shares a word with one that is."""
    present = {scene.big.kind, scene.small.kind}
    if rng.random() < 0.5:
        return Turn(f"is there a {rng.choice(sorted(present))}?", "yes")
    words = {word for kind in present for word in kind.split()}
    absent = [k for k in KINDS if k not in present and words & set(k.split())]
    return Turn(f"is there a {rng.choice(absent)}?", "no")


def yes_no_questions(scene: Scene, count: int, rng: random.Random) -> tuple[Turn, ...]:
    """Several yes/no questions about a scene: half of a color or a shape alone, half of both together.

    One question about both together is one bit, and from a bit an example a small model learns nothing: it says "no" to
    everything. Those about a color or a shape alone are learned first, and put together after.
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
    """The scene as ``CELLS`` x ``CELLS`` words, row by row.

    The cells that a thing covers say its color or its shape, in any order; how many they are shows its size.
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
    """The free cells nearest to a thing's middle."""
    centres = [((i % CELLS + 0.5) / CELLS, (i // CELLS + 0.5) / CELLS) for i in range(CELLS * CELLS)]
    free = [i for i in range(len(centres)) if i not in taken]
    return sorted(free, key=lambda i: math.dist(centres[i], (thing.x, thing.y)))[:count]


def corpus_texts(count: int, turns: int, rng: random.Random, among: list[Combination]) -> Iterator[SceneText]:
    """Texts to read from: of twenty, nine are captions, four are questions and seven are yes/no questions.

    Args:
        count: How many.
        turns: Questions in each conversation; of yes/no questions there are twice as many.
        rng: Source of all variation.
        among: Combinations to draw from.
    """
    for i, scene in enumerate(scenes(count, rng, among)):
        conversation: tuple[Turn, ...] = (Turn(DESCRIBE, caption(scene)),)
        if turns and i % 20 >= 9:
            plain = i % 20 < 13
            conversation = questions(scene, turns, rng) if plain else yes_no_questions(scene, 2 * turns, rng)
        yield SceneText(grid(scene, rng), conversation)
