"""Packs sequences end to end in rows; the features of their spans are separate flat tensors."""

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
# Attention cost is quadratic in the row length. At this multiple of the model's width, a layer's matrices and its
# attention over a dense mask cost the same.
DOUBLE = 6


@dataclass(frozen=True)
class Layout:
    """Arrangement of the sequences of a packed batch.

    Attributes:
        kind: ``line``: all in one row with variable-length attention; ``rows``: rows of nearly equal length under a
            block mask; ``alone``: one sequence per row, for models in which either leaks across sequences.
        width: Hidden width of the model; the narrower it is, the larger attention's share of the cost, and the shorter
            the optimal rows.
        long: Smallest mean sequence length for ``line``, in tokens; shorter sequences use ``rows``. 0 for no limit.
    """

    kind: Literal["line", "rows", "alone"] = "rows"
    width: int = 1024
    long: int = 0

    def of(self, samples: Sequence[TokenizedExample], share: bool = False) -> Layout:
        """Return the layout for given sequences: ``line`` becomes ``rows`` if they are short or share a prefix."""
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
    """Source of the features of one kind of span."""

    @property
    def width(self) -> int:
        """Width of a feature."""

    def length(self, reference: Any, /) -> int:
        """Return the number of features of a reference."""

    def rows(self, references: Sequence[Any], /) -> Tensor:
        """Return the concatenated features of all references, float16 on the CPU, (P, width)."""


class PackedBatch(TypedDict):
    """R rows of T tokens, K of them predicted; P features of width D of each kind, at P positions.

    ``targets`` are already shifted: ``targets_K[i]`` is the token after position ``keep_K[i]``.
    """

    input_ids: Tensor  # int64 (R, T)
    position_ids: Tensor  # int64 (R, T), starting at 0 in every sequence
    segments: Tensor  # int64 (R, T), which sequence of its row a token belongs to; -1 after the last
    features: Mapping[str, Tensor]  # by kind: float16 (P, D), in the order of `places`
    places: Mapping[str, Tensor]  # by kind: int64 (P,), in the flattened rows
    keep: Tensor  # int64 (K,), predicting positions in the flattened rows
    targets: Tensor  # int64 (K,)
    step_tokens: Tensor  # float32 (), supervised tokens of the whole optimiser step
    branches: NotRequired[Tensor]  # int64 (R, T), sequence in its shared-prefix group, from 1; 0 in the prefix
    borders: NotRequired[Tensor]  # int32 (S + 1,), cumulative sequence lengths of a line, from 0
    longest: NotRequired[int]  # tokens of the longest sequence of a line
    samples: NotRequired[int]  # number of sequences, with hard negatives only
    sequences: NotRequired[Tensor]  # int64 (K,), sequence of each target
    foils: NotRequired[Tensor]  # int64 (F, 2), hard negatives, each with the sequence that has its own image
    contrast: NotRequired[Tensor]  # float32 (), weight of the contrastive loss


def partition(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Distribute sequences over rows of nearly equal length (longest processing time first, Graham 1969).

    Args:
        lengths: Length of each sequence, in tokens.
        rows: Number of rows; each gets at least one sequence.

    Returns:
        Indices of the sequences of each row, in ascending order.

    Raises:
        ValueError: If there are fewer sequences than rows.
    """
    if len(lengths) < rows:
        raise ValueError(f"{len(lengths)} sequences cannot fill {rows} rows")
    heap: list[tuple[int, int, int]] = [(0, 0, row) for row in range(rows)]
    members: list[list[int]] = [[] for _ in range(rows)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # Among rows of equal length the one with the fewest sequences is first, so that empty rows are filled.
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
    """Pack sequences end to end.

    Args:
        samples: Sequences; at least one.
        features: Feature source of each kind of span.
        step_tokens: Supervised tokens of the whole optimiser step; by default those of ``samples``.
        layout: Arrangement of the sequences.
        rows: Indices of the sequences of each row, such as :func:`rows_of` other sequences; by default the rows follow
            from ``layout``.
        share: Whether adjacent sequences share a common prefix; only in the layout ``rows``.
        foils: Hard negatives: index of a sequence with another image, and index of the same one with its own image.
        contrast: Weight of the contrastive loss.

    Raises:
        ModelError: If a span's length differs from the number of its features.
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
    """Return the indices of the sequences of each row; the number of rows minimises the cost, padding included."""
    return _rows([len(sample) for sample in samples], layout.of(samples))


def _rows(lengths: Sequence[int], layout: Layout) -> list[list[int]]:
    if layout.kind == "line":
        return [list(range(len(lengths)))]
    return partition(lengths, len(lengths)) if layout.kind == "alone" else cheapest_rows(lengths, layout.width)


def cheapest_rows(lengths: Sequence[int], width: int = ROWS.width) -> list[list[int]]:
    """Distribute sequences over the number of rows with the lowest computing cost.

    Few long rows waste little on padding and much on attention; many short rows the reverse. Sequences of nearly equal
    length fit well into some numbers of rows and badly into others. Row counts are tried in the order of their cost
    with evenly filled rows, a lower bound, until no remaining count can be better.

    Args:
        lengths: Length of each sequence, in tokens.
        width: Hidden width of the model.

    Returns:
        Indices of the sequences of each row.
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
    """Check that each span of a sequence is as long as the features of its reference.

    Raises:
        ModelError: If one is not; names the sequence.
    """
    for span in sample.spans:
        have = features[span.kind].length(span.reference) if span.kind in features else 0
        if have != span.length:
            raise ModelError(
                f"{sample.name}: a span of {span.length} positions for an {span.kind} with {have} features"
            )


def features_by_kind(
    spans: Sequence[FeatureSpan], features: Mapping[str, SpanFeatures]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the features, (P, D), and positions, (P,), of spans by kind; ``start`` refers to the flattened rows."""
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
    """Yield all samples in order, in packs of at most ``max_tokens`` tokens; a longer sample is a pack alone.

    Adjacent samples share a common prefix in the layout ``rows``.
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
    """Return a tensor, or a nested mapping of tensors, on another device; integers are kept."""
    # T is a tensor or a nested mapping of tensors, which mypy cannot express without a type for every depth.
    if isinstance(pack, Tensor):
        return pack.to(device)  # type: ignore[return-value]
    if isinstance(pack, int):
        return pack
    return {name: to_device(value, device) for name, value in pack.items()}  # type: ignore[attr-defined,return-value]
