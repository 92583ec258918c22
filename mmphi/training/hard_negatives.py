"""Foils: what is said about one image of a step, put to another one of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from mmphi.text.shared_prefix import group_by_shared_prefix
from mmphi.text.tokenized_example import TokenizedExample

LEAST = 4  # Supervised tokens: a yes, or a word, may be as right of the other image.


class PackUnit(NamedTuple):
    """Sequences that have to be in one pack.

    Attributes:
        samples: Those of a step, and foils.
        foils: Which of them are foils, by index, each with that of the same sequence with its own image.
    """

    samples: tuple[TokenizedExample, ...]
    foils: tuple[tuple[int, int], ...]

    def length(self) -> int:
        """Tokens in all; what sequences about one image share counts once."""
        return sum(bundle.length(self.samples) for bundle in group_by_shared_prefix(self.samples))


def pair_hard_negatives(samples: Sequence[TokenizedExample]) -> list[PackUnit]:
    """The sequences of a step in pairs, each of which is put to the other one's image as well.

    The first is paired with the first of the second half, so that neighbours about one image are not; where two see as
    many images of the same lengths, but not the same ones. The others, and the last of an odd number, stand alone.
    """
    half = len(samples) // 2
    units = []
    for first, second in zip(samples[:half], samples[half : 2 * half], strict=True):
        if can_be_negative(first, second):
            put = first, with_images_of(second, first), second, with_images_of(first, second)
            units.append(PackUnit(put, ((1, 2), (3, 0))))
        else:
            units += [PackUnit((first,), ()), PackUnit((second,), ())]
    return [*units, *(PackUnit((sample,), ()) for sample in samples[2 * half :])]


def can_be_negative(first: TokenizedExample, second: TokenizedExample) -> bool:
    """Whether one sequence could be put to what the other one sees."""
    if min(int(sample.supervised.sum()) for sample in (first, second)) < LEAST:
        return False
    shapes = [[(span.kind, span.length) for span in sample.spans] for sample in (first, second)]
    if not first.spans or shapes[0] != shapes[1] or any(span.kind != "image" for span in first.spans):
        return False
    # A view of an image is no other image.
    return [span.reference.id for span in first.spans] != [span.reference.id for span in second.spans]


def with_images_of(sample: TokenizedExample, other: TokenizedExample) -> TokenizedExample:
    """A sequence with the images of another one."""
    spans = (own._replace(reference=theirs.reference) for own, theirs in zip(sample.spans, other.spans, strict=True))
    return replace(sample, spans=tuple(spans))


def collate_with_negatives(units: Sequence[PackUnit]) -> tuple[list[TokenizedExample], list[tuple[int, int]]]:
    """The sequences of several units, and their foils."""
    samples, foils = list[TokenizedExample](), list[tuple[int, int]]()
    for unit in units:
        foils += [(len(samples) + foil, len(samples) + own) for foil, own in unit.foils]
        samples += unit.samples
    return samples, foils
