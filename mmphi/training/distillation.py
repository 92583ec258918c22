"""Distillation of the text-conditioned model into the audio-conditioned one (KL divergence).

After Ultravox (fixie-ai/ultravox, ``ultravox_model.py``): the Kullback-Leibler divergence of the frozen model's
predictions, at a temperature, at every token of the answer, with additional weight on the token that ends it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmphi.config.shared import TrainingSettings
from mmphi.models.packed_vlm import PackedVLM
from mmphi.text.packing import ROWS, Layout, PackedBatch, SpanFeatures, pack, partition, rows_of
from mmphi.text.tokenized_example import TokenizedExample
from mmphi.training.packed_dataset import PackedStepDataset, packed_dataset


class DistillationPair(TypedDict):
    """The same conversations in audio and text form, with the same supervised tokens in the same order."""

    with_audio: PackedBatch
    with_text: PackedBatch
    ends: Tensor  # bool (K,), which supervised tokens end an answer
    segments: Tensor  # of both forms, flattened; for the token count
    step_tokens: Tensor


class DistillationTask(nn.Module):
    """Summed KL divergence of the predictions after audio from those after text, times T squared.

    Args:
        packed: Model with an audio projector; the same frozen language model is the teacher.
        temperature: T, the divisor of both logits.
        end_weight: Additional weight of the token that ends an answer.
    """

    def __init__(self, packed: PackedVLM, temperature: float, end_weight: float) -> None:
        super().__init__()
        self.packed, self.temperature, self.end_weight = packed, temperature, end_weight

    def forward(self, with_audio: Any, with_text: Any, ends: Tensor, **_: Tensor) -> Tensor:
        """Nats times T squared, summed over supervised tokens, shape ()."""
        with torch.no_grad():
            wanted = F.log_softmax(self.packed.logits(with_text).float() / self.temperature, dim=-1)
        found = F.log_softmax(self.packed.logits(with_audio).float() / self.temperature, dim=-1)
        each = F.kl_div(found, wanted, reduction="none", log_target=True).sum(dim=-1)
        return (each * (1 + self.end_weight * ends)).sum() * self.temperature**2


class DistillationDataset(Dataset[DistillationPair]):
    """Pairs of packs of every optimiser step, by index, in the order of :class:`PackedStepDataset`.

    Args:
        steps: Dataset of the conversations in audio form.
        with_text: The same conversations in text form, in the same order.
        end: ID of the token that ends an answer.
    """

    def __init__(self, steps: PackedStepDataset, with_text: Sequence[TokenizedExample], end: int) -> None:
        if len(with_text) != len(steps.samples):
            raise ValueError(f"{len(steps.samples)} conversations in audio form, but {len(with_text)} in text form")
        self.steps, self.with_text, self.end = steps, with_text, end

    def __len__(self) -> int:
        return len(self.steps)

    def supervised(self) -> int:
        """Returns the number of supervised tokens of the whole training."""
        return self.steps.supervised()

    def __getitem__(self, index: int) -> DistillationPair:
        steps = self.steps
        chosen = steps.chosen(index // steps.packs_per_step)
        lengths = [len(steps.samples[i]) for i in chosen]
        share = partition(lengths, steps.packs_per_step)[index % steps.packs_per_step]
        total = sum(int(steps.samples[i].supervised.sum()) for i in chosen)
        own = [chosen[i] for i in share]
        return collate_pairs(
            [steps.samples[i] for i in own],
            [self.with_text[i] for i in own],
            steps.features,
            self.end,
            total,
            layout=steps.layout,
        )


def collate_pairs(
    with_audio: Sequence[TokenizedExample],
    with_text: Sequence[TokenizedExample],
    features: Mapping[str, SpanFeatures],
    end: int,
    step_tokens: int | None = None,
    *,
    layout: Layout = ROWS,
) -> DistillationPair:
    """Pack conversations in audio and in text form, with the same conversations in each row.

    Args:
        with_audio: Sequences with recordings.
        with_text: The same sequences with transcripts in place of the recordings.
        features: Feature source of each kind of span.
        end: ID of the token that ends an answer.
        step_tokens: Supervised tokens of the whole step; by default those of these samples.
        layout: Layout of the packs.
    """
    rows = rows_of(with_audio, layout=layout)
    ours = pack(with_audio, features, step_tokens, layout=layout, rows=rows)
    theirs = pack(with_text, features, step_tokens, layout=layout, rows=rows)
    if not torch.equal(ours["targets"], theirs["targets"]):
        raise ValueError("the audio and the text form have different answers")
    segments = torch.cat([ours["segments"].flatten(), theirs["segments"].flatten()])
    return DistillationPair(
        with_audio=ours,
        with_text=theirs,
        ends=ours["targets"] == end,
        segments=segments,
        step_tokens=ours["step_tokens"],
    )


def distillation_dataset(
    with_audio: Sequence[TokenizedExample],
    with_text: Sequence[TokenizedExample],
    features: Mapping[str, SpanFeatures],
    settings: TrainingSettings,
    end: int,
    *,
    layout: Layout = ROWS,
) -> DistillationDataset:
    """Returns the pairs of a training with the given settings, over all processes that train together."""
    return DistillationDataset(packed_dataset(with_audio, features, settings, layout=layout), with_text, end)
