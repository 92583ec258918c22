"""Order and packs of training sequences.

An optimiser step is a fixed set of sequences, for any number of rows, packs or processes: so packed equals unpacked,
accumulated equals whole and two processes equal one by construction. Every pack carries the number of supervised tokens
of the *whole* step, by which its summed loss is divided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from mmphi.config.shared import TrainingSettings
from mmphi.text.packing import ROWS, Layout, PackedBatch, SpanFeatures, pack, partition
from mmphi.text.shared_prefix import group_by_shared_prefix
from mmphi.text.tokenized_example import TokenizedExample
from mmphi.training.hard_negatives import PackUnit, collate_with_negatives, pair_hard_negatives
from mmphi.training.training_args import world_size


class ShuffledOrder:
    """Item indices of each optimiser step: all items once per epoch, shuffled again in every epoch.

    Args:
        count: Number of items.
        batch_size: Items per step.
        seed: Seed of the order.
        groups: Indices of items that stay adjacent, covering all items; by default each item is a group.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, groups: Sequence[npt.NDArray[np.int64]] | None = None
    ) -> None:
        self.count, self.batch_size, self.seed, self.groups = count, batch_size, seed, groups
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng([self.seed, epoch])
        if self.groups is None:
            return rng.permutation(self.count)
        return np.concatenate([self.groups[i] for i in rng.permutation(len(self.groups))])

    def chosen(self, step: int) -> list[int]:
        """Returns the item indices of a step."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [int(self._order(place // self.count)[place % self.count]) for place in places]


class PackedStepDataset(Dataset[PackedBatch]):
    """Packs of every optimiser step of a training, by index, as a pure function of samples, seed and step.

    Pack ``i`` belongs to step ``i // packs_per_step``. Samples are shuffled again in every epoch. There is no random
    state, so resuming at step k needs only k.

    Args:
        samples: Training sequences.
        features: Feature source of each kind of span.
        steps: Optimiser steps.
        batch_size: Sequences per step.
        packs_per_step: Forward passes per step over all processes.
        seed: Seed of the order.
        layout: Layout of the packs.
        views: Number of augmented views per image, used in rotation over epochs.
        max_examples_per_image: Maximum number of adjacent sequences about the same images, which share their prefix.
        contrast: Weight of the loss against hard negatives; 0 for none.
        contrast_from: First step with hard negatives.
    """

    def __init__(
        self,
        samples: Sequence[TokenizedExample],
        features: Mapping[str, SpanFeatures],
        *,
        steps: int,
        batch_size: int,
        packs_per_step: int,
        seed: int,
        layout: Layout = ROWS,
        views: int = 1,
        max_examples_per_image: int = 1,
        contrast: float = 0.0,
        contrast_from: int = 0,
    ) -> None:
        if not samples:
            raise ValueError("there are no training sequences")
        if batch_size < packs_per_step:
            raise ValueError(f"batch_size = {batch_size} is less than {packs_per_step} forward passes per step")
        self.samples, self.features = samples, features
        self.steps, self.batch_size, self.packs_per_step, self.seed = steps, batch_size, packs_per_step, seed
        self.layout, self.views, self.max_examples_per_image = layout, views, max_examples_per_image
        self.contrast, self.contrast_from = contrast, contrast_from
        groups = group_by_images(samples, max_examples_per_image) if max_examples_per_image > 1 else None
        self._turn = np.arange(len(samples))
        for turn, group in enumerate(groups or ()):
            self._turn[group] = turn
        self.chosen = ShuffledOrder(len(samples), batch_size, seed, groups).chosen

    def __len__(self) -> int:
        return self.steps * self.packs_per_step

    def step(self, step: int) -> list[TokenizedExample]:
        """Returns the samples of one optimiser step."""
        first, count = step * self.batch_size, len(self.samples)
        return [
            with_augmented_images(self.samples[index], int(self._turn[index] + (first + place) // count) % self.views)
            for place, index in enumerate(self.chosen(step))
        ]

    def supervised(self) -> int:
        """Returns the number of supervised tokens of the whole training."""
        return sum(self._supervised_of(step) for step in range(self.steps))

    def until(self, tokens: int) -> int:
        """Returns the number of steps that have at least ``tokens`` supervised tokens, independent of ``steps``.

        Two trainings with the same seed and the same text need the same number of steps, whatever their features are.
        """
        step = learned = 0
        while learned < tokens:
            learned += self._supervised_of(step)
            step += 1
        return step

    def _supervised_of(self, step: int) -> int:
        return sum(int(s.supervised.sum()) for s in self.step(step))

    def __getitem__(self, index: int) -> PackedBatch:
        samples = self.step(index // self.packs_per_step)
        total = sum(int(s.supervised.sum()) for s in samples)
        if self.contrast and index // self.packs_per_step >= self.contrast_from:
            return self._against_foils(samples, total, index % self.packs_per_step)
        bundles = group_by_shared_prefix(samples, self.max_examples_per_image > 1)
        if len(bundles) < self.packs_per_step:
            bundles = group_by_shared_prefix(samples, share=False)
        shares = partition([bundle.length(samples) for bundle in bundles], self.packs_per_step)
        own = [samples[i] for b in shares[index % self.packs_per_step] for i in bundles[b].members]
        return pack(own, self.features, total, layout=self.layout, share=self.max_examples_per_image > 1)

    def _against_foils(self, samples: Sequence[TokenizedExample], total: int, part: int) -> PackedBatch:
        units = pair_hard_negatives(samples)
        if len(units) < self.packs_per_step:
            units = [PackUnit((sample,), ()) for sample in samples]
        share = partition([unit.length() for unit in units], self.packs_per_step)[part]
        own, foils = collate_with_negatives([units[i] for i in share])
        how: dict[str, Any] = {"layout": self.layout, "share": True, "foils": foils, "contrast": self.contrast}
        return pack(own, self.features, total, **how)


def group_by_images(samples: Sequence[TokenizedExample], max_examples_per_image: int) -> list[npt.NDArray[np.int64]]:
    """Returns the indices of sequences about the same images, in groups of at most ``max_examples_per_image``."""
    about: dict[tuple[Any, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        seen = tuple(span.reference for span in sample.spans)
        about.setdefault(seen or (index,), []).append(index)
    return [
        np.asarray(all_of[first : first + max_examples_per_image])
        for all_of in about.values()
        for first in range(0, len(all_of), max_examples_per_image)
    ]


def with_augmented_images(sample: TokenizedExample, view: int) -> TokenizedExample:
    """Returns a sequence with an augmented view of its images; 0 is the original."""
    if not view:
        return sample
    spans = tuple(
        span._replace(reference=replace(span.reference, view=view)) if span.kind == "image" else span
        for span in sample.spans
    )
    return replace(sample, spans=spans)


def packed_dataset(
    samples: Sequence[TokenizedExample],
    features: Mapping[str, SpanFeatures],
    settings: TrainingSettings,
    *,
    layout: Layout = ROWS,
    views: int = 1,
    max_examples_per_image: int = 1,
    contrast: float = 0.0,
    contrast_from: float = 0.0,
) -> PackedStepDataset:
    """Returns the packs of a training with the given settings, over all processes that train together.

    ``contrast_from`` is a share of the steps; for the other arguments see :class:`PackedStepDataset`.
    """
    return PackedStepDataset(
        samples,
        features,
        steps=settings.steps,
        batch_size=settings.batch_size,
        packs_per_step=settings.gradient_accumulation_steps * world_size(),
        seed=settings.seed,
        layout=layout,
        views=views,
        max_examples_per_image=max_examples_per_image,
        contrast=contrast,
        contrast_from=round(contrast_from * settings.steps),
    )
