"""Sequences laid end to end in rows, and the order in which training meets them.

An optimiser step is a fixed set of sequences, however many rows, packs or processes it is spread over: so packed
equals unpacked, accumulated equals whole and two processes equal one by construction. Every pack carries the number of
supervised tokens of the *whole* step, which its summed loss is divided by.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, TypedDict, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmphi.data.sequences import Sample
from mmphi.errors import ModelError

if TYPE_CHECKING:
    from mmphi.data.features import ImageFeatures

ROW_TOKENS = 256  # Attention costs the square of a row: rows are no longer than this, unless a sequence is.


class Pack(TypedDict):
    """R rows of T tokens, K of them predicted, with N images of F features of width D.

    ``targets`` are shifted here, once: ``targets_K[i]`` is the token after position ``keep_K[i]``.
    """

    input_ids: Tensor  # int64 (R, T)
    position_ids: Tensor  # int64 (R, T), starting at 0 in every sequence
    segments: Tensor  # int64 (R, T), which sequence of its row a token belongs to; -1 after the last
    image_mask: Tensor  # bool (R, T), where features stand
    features: Tensor  # float16 (N, F, D), in the order of their places
    keep: Tensor  # int64 (K,), places in the flattened rows
    targets: Tensor  # int64 (K,)
    step_tokens: Tensor  # float32 (), supervised tokens of the whole optimiser step


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


def pack(samples: Sequence[Sample], features: ImageFeatures | None, step_tokens: int | None = None) -> Pack:
    """Lay sequences end to end in rows of nearly equal length.

    Args:
        samples: At least one.
        features: Where the images' features come from; ``None`` where no sample has an image.
        step_tokens: Supervised tokens of the whole step; those of these samples where left out.

    Raises:
        ModelError: If a sample holds another number of image places than its image has features.
    """
    lengths = [len(sample) for sample in samples]
    rows = partition(lengths, max(1, -(-sum(lengths) // max(ROW_TOKENS, *lengths, 1))))
    shape = len(rows), max(sum(lengths[i] for i in row) for row in rows)
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segments, image_mask = np.full(shape, -1, np.int64), np.zeros(shape, np.bool_)
    supervised = np.zeros(shape, np.bool_)
    images = []
    for r, row in enumerate(rows):
        start = 0
        for segment, index in enumerate(row):
            sample = samples[index]
            place = np.s_[r, start : start + len(sample)]
            ids[place], positions[place] = sample.input_ids, np.arange(len(sample))
            segments[place], supervised[place] = segment, sample.supervised
            if sample.image is not None:
                if features is None or sample.image_tokens != features.tokens:
                    have = "no features" if features is None else f"{features.tokens} features"
                    raise ModelError(f"{sample.name} has {sample.image_tokens} places for an image of {have}")
                first = start + sample.image_start
                image_mask[r, first : first + sample.image_tokens] = True
                images.append(sample.image)
            start += len(sample)
    (targets,) = np.nonzero(supervised.ravel())
    return Pack(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        segments=torch.from_numpy(segments),
        image_mask=torch.from_numpy(image_mask),
        features=torch.zeros(0, 1, 1, dtype=torch.float16) if features is None else features.get(images),
        keep=torch.from_numpy(targets - 1),
        targets=torch.from_numpy(ids.ravel()[targets]),
        step_tokens=torch.tensor(float(len(targets) if step_tokens is None else step_tokens)),
    )


class PackedSteps(Dataset[Pack]):
    """The packs of every optimiser step of a training, by index: a pure function of samples, seed and step.

    Pack ``i`` belongs to step ``i // packs_per_step``. Samples are shuffled anew each time all were seen. Nothing is
    drawn while fetching, so resuming at step k needs nothing but k.

    Args:
        samples: What to train on.
        features: Where image features come from.
        steps: Optimiser steps.
        batch_size: Sequences per step.
        packs_per_step: Forward passes per step over all processes.
        seed: Seed of the order.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        features: ImageFeatures | None,
        *,
        steps: int,
        batch_size: int,
        packs_per_step: int,
        seed: int,
    ) -> None:
        if not samples:
            raise ValueError("there is nothing to train on")
        if batch_size < packs_per_step:
            raise ValueError(f"batch_size = {batch_size} is less than {packs_per_step} forward passes per step")
        self.samples, self.features = samples, features
        self.steps, self.batch_size, self.packs_per_step, self.seed = steps, batch_size, packs_per_step, seed
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return self.steps * self.packs_per_step

    def _shuffled(self, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.samples))

    def step(self, step: int) -> list[Sample]:
        """The samples of one optimiser step."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        count = len(self.samples)
        return [self.samples[self._order(place // count)[place % count]] for place in places]

    def __getitem__(self, index: int) -> Pack:
        samples = self.step(index // self.packs_per_step)
        total = sum(int(s.supervised.sum()) for s in samples)
        shares = partition([len(s) for s in samples], self.packs_per_step)
        return pack([samples[i] for i in shares[index % self.packs_per_step]], self.features, total)


def packs(samples: Sequence[Sample], features: ImageFeatures | None, max_tokens: int) -> Iterator[Pack]:
    """All samples once, in order, in packs of at most ``max_tokens`` tokens (a longer sample is packed alone)."""
    waiting: list[Sample] = []
    for sample in samples:
        if waiting and sum(map(len, waiting)) + len(sample) > max_tokens:
            yield pack(waiting, features)
            waiting = []
        waiting.append(sample)
    if waiting:
        yield pack(waiting, features)


def to_device(pack: Pack, device: torch.device) -> Pack:
    """The same pack on another device."""
    return cast(Pack, {name: tensor.to(device) for name, tensor in pack.items() if isinstance(tensor, Tensor)})
