"""Scenes: two coloured shapes in a spatial relation, with their attributes.

The larger shape is always named first, so that a scene has exactly one correct caption. A share of all combinations of
colour, shape, relation, colour and shape is held out: it occurs in no training or validation image and in no text.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

COLORS = {
    "red": (214, 40, 40),
    "orange": (247, 140, 20),
    "yellow": (250, 222, 50),
    "green": (40, 160, 70),
    "blue": (35, 90, 215),
    "purple": (135, 60, 175),
    "black": (25, 25, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
KINDS = [f"{color} {shape}" for color in COLORS for shape in SHAPES]

Combination = tuple[str, str, str]  # big kind, relation, small kind


@dataclass(frozen=True)
class Thing:
    """A shape in a scene; position and radius are fractions of the image's side, with the origin at the top left."""

    color: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def kind(self) -> str:
        """Color and shape: ``red circle``."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A big thing, a small thing, and the position of the big one relative to the small one."""

    big: Thing
    relation: str
    small: Thing

    @property
    def attributes(self) -> dict[str, str]:
        """Attributes that a caption of this scene is scored on."""
        return {
            "color1": self.big.color,
            "shape1": self.big.shape,
            "relation": self.relation,
            "color2": self.small.color,
            "shape2": self.small.shape,
        }


@cache
def combinations() -> tuple[Combination, ...]:
    """Returns every combination; the two things always differ."""
    pairs = itertools.permutations(KINDS, 2)
    return tuple((big, relation, small) for big, small in pairs for relation in RELATIONS)


@cache
def held_out(share: float, seed: int) -> frozenset[Combination]:
    """Returns the combinations that are held out from training.

    Args:
        share: Share of all combinations.
        seed: Seed of the selection.
    """
    everything = list(combinations())
    random.Random(f"held out {seed}").shuffle(everything)
    return frozenset(everything[: max(1, round(share * len(everything)))])


def sample(combination: Combination, rng: random.Random) -> Scene:
    """Returns a scene with the things of a combination at random places: unambiguous, complete and not overlapping."""
    big_kind, relation, small_kind = combination
    big_radius, small_radius = rng.uniform(0.21, 0.26), rng.uniform(0.13, 0.16)
    margin, reach = 0.03, big_radius + small_radius
    while True:
        x, y = (rng.uniform(big_radius + margin, 1 - big_radius - margin) for _ in "xy")
        u, v = (rng.uniform(small_radius + margin, 1 - small_radius - margin) for _ in "xy")
        along, across = (u - x, v - y) if "of" in relation else (v - y, u - x)
        forward = along if relation in ("left of", "above") else -along
        if forward >= reach + 0.02 and abs(across) <= 0.5 * forward:
            break
    big, small = big_kind.split(), small_kind.split()
    return Scene(Thing(big[0], big[1], x, y, big_radius), relation, Thing(small[0], small[1], u, v, small_radius))


def scenes(count: int, rng: random.Random, among: list[Combination]) -> Iterator[Scene]:
    """Yields scenes whose combinations are drawn uniformly, with replacement."""
    for _ in range(count):
        yield sample(rng.choice(among), rng)
