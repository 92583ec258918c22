"""The order in which training meets its sequences.

An optimiser step is a fixed set of sequences, however many rows, packs or processes it is spread over: so packed
equals unpacked, accumulated equals whole and two processes equal one by construction. Every pack carries the number of
supervised tokens of the *whole* step, which its summed loss is divided by.
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
    """Which of some things each optimiser step takes: all of them in turn, shuffled again each time all were seen.

    Args:
        count: How many things there are.
        batch_size: Taken by a step.
        seed: Seed of the order.
        groups: Things that stay beside each other, by index, of all things; without it each stands alone.
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
        """What a step takes, by index."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [int(self._order(place // self.count)[place % self.count]) for place in places]


class PackedStepDataset(Dataset[PackedBatch]):
    """The packs of every optimiser step of a training, by index: a pure function of samples, seed and step.

    Pack ``i`` belongs to step ``i // packs_per_step``. Samples are shuffled again each time all were seen. Nothing is
    drawn while fetching, so resuming at step k needs nothing but k.

    Args:
        samples: What to train on.
        features: Where image features come from.
        steps: Optimiser steps.
        batch_size: Sequences per step.
        packs_per_step: Forward passes per step over all processes.
        seed: Seed of the order.
        layout: How the sequences of a pack lie.
        views: Of each image, which take turns from one time to the next that a sequence is met.
        together: Sequences about the same images that are met one after the other, at most; they share what they see.
        contrast: Weight of telling sequences from the same ones put to another image of the step.
        contrast_from: The step from which on.
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
        together: int = 1,
        contrast: float = 0.0,
        contrast_from: int = 0,
    ) -> None:
        if not samples:
            raise ValueError("there is nothing to train on")
        if batch_size < packs_per_step:
            raise ValueError(f"batch_size = {batch_size} is less than {packs_per_step} forward passes per step")
        self.samples, self.features = samples, features
        self.steps, self.batch_size, self.packs_per_step, self.seed = steps, batch_size, packs_per_step, seed
        self.layout, self.views, self.together = layout, views, together
        self.contrast, self.contrast_from = contrast, contrast_from
        groups = group_by_images(samples, together) if together > 1 else None
        self._turn = np.arange(len(samples))
        for turn, group in enumerate(groups or ()):
            self._turn[group] = turn
        self.chosen = ShuffledOrder(len(samples), batch_size, seed, groups).chosen

    def __len__(self) -> int:
        return self.steps * self.packs_per_step

    def step(self, step: int) -> list[TokenizedExample]:
        """The samples of one optimiser step."""
        first, count = step * self.batch_size, len(self.samples)
        return [
            with_augmented_images(self.samples[index], int(self._turn[index] + (first + place) // count) % self.views)
            for place, index in enumerate(self.chosen(step))
        ]

    def supervised(self) -> int:
        """Tokens learned from in the whole training."""
        return sum(self._supervised_of(step) for step in range(self.steps))

    def until(self, tokens: int) -> int:
        """Steps after which at least so many tokens were learned from, however many steps were asked for.

        Two trainings of one seed and of sequences that say the same need the same number of steps, whatever the
        features in them are.
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
        bundles = group_by_shared_prefix(samples, self.together > 1)
        if len(bundles) < self.packs_per_step:
            bundles = group_by_shared_prefix(samples, share=False)
        shares = partition([bundle.length(samples) for bundle in bundles], self.packs_per_step)
        own = [samples[i] for b in shares[index % self.packs_per_step] for i in bundles[b].members]
        return pack(own, self.features, total, layout=self.layout, share=self.together > 1)

    def _against_foils(self, samples: Sequence[TokenizedExample], total: int, part: int) -> PackedBatch:
        units = pair_hard_negatives(samples)
        if len(units) < self.packs_per_step:
            units = [PackUnit((sample,), ()) for sample in samples]
        share = partition([unit.length() for unit in units], self.packs_per_step)[part]
        own, foils = collate_with_negatives([units[i] for i in share])
        how: dict[str, Any] = {"layout": self.layout, "share": True, "foils": foils, "contrast": self.contrast}
        return pack(own, self.features, total, **how)


def group_by_images(samples: Sequence[TokenizedExample], together: int) -> list[npt.NDArray[np.int64]]:
    """Sequences about the same images, by index, in groups of at most ``together``."""
    about: dict[tuple[Any, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        seen = tuple(span.reference for span in sample.spans)
        about.setdefault(seen or (index,), []).append(index)
    return [
        np.asarray(all_of[first : first + together])
        for all_of in about.values()
        for first in range(0, len(all_of), together)
    ]


def with_augmented_images(sample: TokenizedExample, view: int) -> TokenizedExample:
    """A sequence with a view of its images."""
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
    together: int = 1,
    contrast: float = 0.0,
    contrast_from: float = 0.0,
) -> PackedStepDataset:
    """The packs of a training as its settings have it, over all processes that train together.

    ``contrast_from`` is a share of its steps; for the others see :class:`PackedStepDataset`.
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
        together=together,
        contrast=contrast,
        contrast_from=round(contrast_from * settings.steps),
    )
