"""Hard negatives: the text about one image of a step, combined with another image of the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from mmphi.text.shared_prefix import group_by_shared_prefix
from mmphi.text.tokenized_example import TokenizedExample

LEAST = 4  # Supervised tokens; shorter answers, such as "yes", are often right for the other image as well.


class PackUnit(NamedTuple):
    """Sequences that must be in one pack.

    Attributes:
        samples: Sequences of a step, and hard negatives.
        foils: Index of each hard negative, with the index of the same sequence with its own image.
    """

    samples: tuple[TokenizedExample, ...]
    foils: tuple[tuple[int, int], ...]

    def length(self) -> int:
        """Tokens in total; a shared prefix counts once."""
        return sum(bundle.length(self.samples) for bundle in group_by_shared_prefix(self.samples))


def pair_hard_negatives(samples: Sequence[TokenizedExample]) -> list[PackUnit]:
    """Pair the sequences of a step, and add each one with the images of the other as a hard negative.

    Sequence i is paired with sequence i of the second half, because neighbours may be about one image. Sequences for
    which :func:`can_be_negative` is false, and the last of an odd number, form units without hard negatives.
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
    """Whether two sequences can exchange their images: equal span lengths, different images, long enough answers."""
    if min(int(sample.supervised.sum()) for sample in (first, second)) < LEAST:
        return False
    shapes = [[(span.kind, span.length) for span in sample.spans] for sample in (first, second)]
    if not first.spans or shapes[0] != shapes[1] or any(span.kind != "image" for span in first.spans):
        return False
    # Augmented views of one image count as the same image.
    return [span.reference.id for span in first.spans] != [span.reference.id for span in second.spans]


def with_images_of(sample: TokenizedExample, other: TokenizedExample) -> TokenizedExample:
    """Returns a sequence with the images of another one."""
    spans = (own._replace(reference=theirs.reference) for own, theirs in zip(sample.spans, other.spans, strict=True))
    return replace(sample, spans=tuple(spans))


def collate_with_negatives(units: Sequence[PackUnit]) -> tuple[list[TokenizedExample], list[tuple[int, int]]]:
    """Returns the sequences of several units, and the index pairs of their hard negatives."""
    samples, foils = list[TokenizedExample](), list[tuple[int, int]]()
    for unit in units:
        foils += [(len(samples) + foil, len(samples) + own) for foil, own in unit.foils]
        samples += unit.samples
    return samples, foils
