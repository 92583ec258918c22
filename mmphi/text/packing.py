"""Sequences laid end to end in rows, with the features of their spans flat beside them."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal, NotRequired, Protocol, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmphi.errors import ModelError
from mmphi.text.shared_prefix import group_by_shared_prefix
from mmphi.text.tokenized_example import FeatureSpan, TokenizedExample

T = TypeVar("T")
# Attention costs the square of a row. At so many times its model's width a layer's matrices and its attention over a
# dense mask are equally much work.
DOUBLE = 6


@dataclass(frozen=True)
class Layout:
    """How sequences lie together.

    Attributes:
        kind: ``line``: all in one row, with borders that attention keeps to; ``rows``: in rows of nearly equal length,
            under a mask of who sees whom; ``alone``: one a row, for models that see through either.
        width: Of the model that reads them: the narrower it is, the more of its work is attention, and the shorter
            rows are best.
        long: A line is for sequences of so many tokens on average; shorter ones lie in rows.
    """

    kind: Literal["line", "rows", "alone"] = "rows"
    width: int = 1024
    long: int = 0

    def of(self, samples: Sequence[TokenizedExample], share: bool = False) -> Layout:
        """The same, with what these sequences decide: a line, or rows, as are those that share their beginning."""
        if self.kind != "line" or not self.long:
            return self
        short = sum(map(len, samples)) < self.long * len(samples)
        return (
            replace(self, kind="rows")
            if short or (share and len(group_by_shared_prefix(samples)) < len(samples))
            else self
        )


ROWS = Layout()


class SpanFeatures(Protocol):
    """Where the features of one kind of span come from."""

    @property
    def width(self) -> int:
        """Width of a feature."""

    def length(self, reference: Any, /) -> int:
        """How many features a reference has."""

    def rows(self, references: Sequence[Any], /) -> Tensor:
        """The features of all references, one after the other, float16 on the CPU, (P, width)."""


class PackedBatch(TypedDict):
    """R rows of T tokens, K of them predicted; P features of width D of each kind, at P places.

    ``targets`` are shifted here, once: ``targets_K[i]`` is the token after position ``keep_K[i]``.
    """

    input_ids: Tensor  # int64 (R, T)
    position_ids: Tensor  # int64 (R, T), starting at 0 in every sequence
    segments: Tensor  # int64 (R, T), which sequence of its row a token belongs to; -1 after the last
    features: Mapping[str, Tensor]  # by kind: float16 (P, D), in the order of their places
    places: Mapping[str, Tensor]  # by kind: int64 (P,), in the flattened rows
    keep: Tensor  # int64 (K,), places in the flattened rows
    targets: Tensor  # int64 (K,)
    step_tokens: Tensor  # float32 (), supervised tokens of the whole optimiser step
    branches: NotRequired[Tensor]  # int64 (R, T), which of a bundle's answers a token is of; 0 before they part
    borders: NotRequired[Tensor]  # int32 (S + 1,), where each sequence of a line begins, and where the last one ends
    longest: NotRequired[int]  # tokens of the longest sequence of a line
    samples: NotRequired[int]  # how many sequences there are, where some are foils
    sequences: NotRequired[Tensor]  # int64 (K,), which sequence each target is of
    foils: NotRequired[Tensor]  # int64 (F, 2), sequences with another image, and the same ones with their own
    contrast: NotRequired[Tensor]  # float32 (), weight of telling the two apart


def partition(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Spread sequences over rows of nearly equal length (longest processing time first, Graham 1969).

    Args:
        lengths: Length of each sequence, in tokens.
        rows: How many rows; each gets at least one sequence.

    Returns:
        For each row the indices of its sequences, in ascending order.

    Raises:
        ValueError: If there are fewer sequences than rows.
    """
    if len(lengths) < rows:
        raise ValueError(f"{len(lengths)} sequences cannot fill {rows} rows")
    heap: list[tuple[int, int, int]] = [(0, 0, row) for row in range(rows)]
    members: list[list[int]] = [[] for _ in range(rows)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # The count comes first among equals, so that an empty row is filled before any other.
        total, count, row = heapq.heappop(heap)
        members[row].append(index)
        heapq.heappush(heap, (total + lengths[index], count + 1, row))
    return [sorted(row) for row in members]


def pack(
    samples: Sequence[TokenizedExample],
    features: Mapping[str, SpanFeatures],
    step_tokens: int | None = None,
    *,
    layout: Layout = ROWS,
    rows: Sequence[Sequence[int]] | None = None,
    share: bool = False,
    foils: Sequence[tuple[int, int]] = (),
    contrast: float = 0.0,
) -> PackedBatch:
    """Lay sequences end to end.

    Args:
        samples: At least one.
        features: Where the features of each kind of span come from.
        step_tokens: Supervised tokens of the whole step; those of these samples where left out.
        layout: How they lie.
        rows: Which sequences each row holds, by index, where they shall lie as others do: :func:`rows_of` those.
        share: Whether neighbours that begin alike may share their beginning, in rows.
        foils: Sequences with an image that is not theirs, by index, each with that of the same one with its own.
        contrast: Weight of telling the two apart.

    Raises:
        ModelError: If a span has another length than what stands there has features.
    """
    one_row = rows is None or len(rows) == 1
    layout = layout.of(samples, share) if one_row or layout.kind != "line" else replace(layout, kind="rows")
    bundles = group_by_shared_prefix(samples, share and layout.kind == "rows" and rows is None)
    lengths = [bundle.length(samples) for bundle in bundles]
    rows = _rows(lengths, layout) if rows is None else rows
    shape = len(rows), max(sum(lengths[i] for i in row) for row in rows)
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segments, branches = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
    supervised, before = np.zeros(shape, np.bool_), np.arange(-1, shape[0] * shape[1] - 1).reshape(shape)
    numbers, spans = np.zeros(shape, np.int64), list[FeatureSpan]()
    for r, row in enumerate(rows):
        start = 0
        for segment, index in enumerate(row):
            first, alike = start, bundles[index].alike
            for branch, number in enumerate(bundles[index].members):
                sample = samples[number]
                own = slice(alike if branch else 0, None)
                place = np.s_[r, start : start + len(sample.input_ids[own])]
                ids[place], positions[place] = sample.input_ids[own], np.arange(len(sample))[own]
                segments[place], supervised[place], numbers[place] = segment, sample.supervised[own], number
                check_feature_lengths(sample, features)
                if not branch:
                    spans += [span._replace(start=r * shape[1] + start + span.start) for span in sample.spans]
                parted = start + (0 if branch else alike)
                branches[r, parted : place[1].stop] = branch + 1
                before[r, parted] = r * shape[1] + first + alike - 1
                start = place[1].stop
    (targets,) = np.nonzero(supervised.ravel())
    flat, places = features_by_kind(spans, features)
    packed = PackedBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        segments=torch.from_numpy(segments),
        features=flat,
        places=places,
        keep=torch.from_numpy(before.ravel()[targets]),
        targets=torch.from_numpy(ids.ravel()[targets]),
        step_tokens=torch.tensor(float(len(targets) if step_tokens is None else step_tokens)),
    )
    if len(bundles) < len(samples):
        packed["branches"] = torch.from_numpy(branches)
    if foils:
        packed["samples"], packed["sequences"] = len(samples), torch.from_numpy(numbers.ravel()[targets])
        packed["foils"], packed["contrast"] = torch.tensor(foils), torch.tensor(contrast)
    if layout.kind == "line":
        in_order = [lengths[i] for row in rows for i in row]
        packed["borders"] = torch.tensor([0, *accumulate(in_order)], dtype=torch.int32)
        packed["longest"] = max(lengths)
    return packed


def rows_of(samples: Sequence[TokenizedExample], *, layout: Layout = ROWS) -> list[list[int]]:
    """Which sequences each row of a pack holds, by index: of rows so many that the work, padding included, is least."""
    return _rows([len(sample) for sample in samples], layout.of(samples))


def _rows(lengths: Sequence[int], layout: Layout) -> list[list[int]]:
    if layout.kind == "line":
        return [list(range(len(lengths)))]
    return partition(lengths, len(lengths)) if layout.kind == "alone" else cheapest_rows(lengths, layout.width)


def cheapest_rows(lengths: Sequence[int], width: int = ROWS.width) -> list[list[int]]:
    """Sequences in that number of rows in which they are computed with the least work.

    Few long rows waste little on padding and much on attention, many short ones the other way round, and sequences of
    nearly the same length fit well into some numbers of rows and badly into others. Numbers are tried in the order of
    what they would cost if they were filled evenly, until none that is left could be better.

    Args:
        lengths: Of each sequence, in tokens.
        width: Of the model.

    Returns:
        For each row the indices of its sequences.
    """
    whole, longest = sum(lengths), max(lengths)

    def work(rows: int, length: float) -> float:
        return rows * length * (1 + length / (DOUBLE * width))

    def even(rows: int) -> float:
        return work(rows, max(whole / rows, longest))

    best, least = [list(range(len(lengths)))], math.inf
    for count in sorted(range(1, len(lengths) + 1), key=lambda rows: (even(rows), rows)):
        if even(count) >= least:
            break
        rows = partition(lengths, count)
        found = work(count, max(sum(lengths[i] for i in row) for row in rows))
        if found < least:
            best, least = rows, found
    return best


def check_feature_lengths(sample: TokenizedExample, features: Mapping[str, SpanFeatures]) -> None:
    """Refuse a sequence whose spans have no features of their length.

    Raises:
        ModelError: Naming the sequence.
    """
    for span in sample.spans:
        have = features[span.kind].length(span.reference) if span.kind in features else 0
        if have != span.length:
            raise ModelError(f"{sample.name} has {span.length} places for an {span.kind} of {have} features")


def features_by_kind(
    spans: Sequence[FeatureSpan], features: Mapping[str, SpanFeatures]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Features and places of spans, by kind; ``start`` counts in the flattened rows."""
    flat, places = {}, {}
    for kind, source in features.items():
        own = [span for span in spans if span.kind == kind]
        flat[kind] = source.rows([span.reference for span in own])
        ranges = [torch.arange(span.start, span.start + span.length) for span in own]
        places[kind] = torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.long)
    return flat, places


def packs(
    samples: Sequence[TokenizedExample], features: Mapping[str, SpanFeatures], max_tokens: int, *, layout: Layout = ROWS
) -> Iterator[PackedBatch]:
    """All samples once, in order, in packs of at most ``max_tokens`` tokens (a longer sample is a pack of its own).

    Neighbours that begin alike share their beginning.
    """
    waiting: list[TokenizedExample] = []
    for sample in samples:
        if waiting and sum(map(len, waiting)) + len(sample) > max_tokens:
            yield pack(waiting, features, layout=layout, share=True)
            waiting = []
        waiting.append(sample)
    if waiting:
        yield pack(waiting, features, layout=layout, share=True)


def to_device(pack: T, device: torch.device) -> T:
    """The same tensors on another device; numbers stay."""
    # T is a tensor or a mapping of such, as deep as packs go; mypy cannot be told so without naming every depth.
    if isinstance(pack, Tensor):
        return pack.to(device)  # type: ignore[return-value]
    if isinstance(pack, int):
        return pack
    return {name: to_device(value, device) for name, value in pack.items()}  # type: ignore[attr-defined,return-value]
