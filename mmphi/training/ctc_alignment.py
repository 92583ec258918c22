"""CTC alignment of projected audio features with the language model's token embeddings.

Connectionist temporal classification (Graves et al. 2006) with the language model's embedding table as the output
layer: each projected feature is trained towards the embedding of the token spoken there, or towards a learned blank
vector. The language model itself is not run, so a step is cheap; distillation through it follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmphi.data.schema import AudioRef
from mmphi.models.audio.audio_features import AudioFeatureSource
from mmphi.models.audio.audio_projector import AudioProjector
from mmphi.text.packing import to_device
from mmphi.training.packed_dataset import ShuffledOrder
from mmphi.training.training_args import world_size


class CTCBatch(TypedDict):
    """Recordings and their tokens: features (P, D) and tokens (S,), concatenated over the recordings."""

    features: Tensor
    lengths: Tensor  # int64 (N,), number of features of each recording
    tokens: Tensor  # int64 (S,), indices into the vocabulary, from 1 on; 0 is the blank
    token_lengths: Tensor  # int64 (N,)
    step_tokens: Tensor


class CTCAlignmentLoss(nn.Module):
    """Summed CTC loss of recordings against the tokens of their transcripts.

    Args:
        projection: The trained module.
        embeddings: Token embeddings of the vocabulary, (V, W), frozen.
    """

    words: Tensor

    def __init__(self, projection: AudioProjector, embeddings: Tensor) -> None:
        super().__init__()
        self.projection = projection
        unit = F.normalize(embeddings.float(), dim=-1)
        self.register_buffer("words", unit)
        self.nothing = nn.Parameter(unit.mean(dim=0))
        self.sharpness = nn.Parameter(torch.tensor(2.5))  # Log of the scale of the cosines, initially 12.

    def scores(self, features: Tensor) -> Tensor:
        """Log-probabilities (P, 1 + V) of the blank and of every token, at each feature."""
        projected = F.normalize(self.projection(features), dim=-1)
        table = torch.cat([F.normalize(self.nothing, dim=-1)[None], self.words])
        return F.log_softmax(projected @ table.T * self.sharpness.exp(), dim=-1)

    def forward(self, features: Tensor, lengths: Tensor, tokens: Tensor, token_lengths: Tensor, **_: Tensor) -> Tensor:
        """Summed loss in nats, shape (); recordings with too few features for their tokens contribute 0."""
        scores = nn.utils.rnn.pad_sequence(list(torch.split(self.scores(features), lengths.tolist())))
        return F.ctc_loss(scores, tokens, lengths, token_lengths, blank=0, reduction="sum", zero_infinity=True)


class CTCAlignmentDataset(Dataset[CTCBatch]):
    """Batches of recordings by index, as a pure function of recordings, seed and step.

    Args:
        recordings: Recordings.
        words: Tokens of each recording, as indices into the vocabulary, from 1 on.
        audio_source: Source of the audio features.
        steps: Optimiser steps.
        batch_size: Recordings per step, over all processes.
        seed: Seed of the order.
    """

    def __init__(
        self,
        recordings: Sequence[AudioRef],
        words: Sequence[Sequence[int]],
        audio_source: AudioFeatureSource,
        *,
        steps: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.recordings, self.words, self.audio_source, self.steps = recordings, words, audio_source, steps
        self.chosen = ShuffledOrder(len(recordings), batch_size, seed).chosen

    def __len__(self) -> int:
        return self.steps * world_size()

    def __getitem__(self, index: int) -> CTCBatch:
        step, share = divmod(index, world_size())
        chosen = self.chosen(step)
        total = sum(len(self.words[i]) for i in chosen)
        return collate(
            [self.recordings[i] for i in chosen[share :: world_size()]],
            [self.words[i] for i in chosen[share :: world_size()]],
            self.audio_source,
            total,
        )


def collate(
    recordings: Sequence[AudioRef],
    words: Sequence[Sequence[int]],
    audio_source: AudioFeatureSource,
    step_tokens: int | None = None,
) -> CTCBatch:
    """Returns recordings and their tokens as one batch.

    Args:
        recordings: Recordings.
        words: Tokens of each recording, as indices into the vocabulary, from 1 on.
        audio_source: Source of the audio features.
        step_tokens: Tokens of the whole step; by default those of these recordings.
    """
    lengths = [len(own) for own in words]
    return CTCBatch(
        features=audio_source.rows(recordings),
        lengths=torch.tensor([audio_source.length(each) for each in recordings]),
        tokens=torch.tensor([token for own in words for token in own], dtype=torch.long),
        token_lengths=torch.tensor(lengths),
        step_tokens=torch.tensor(float(sum(lengths) if step_tokens is None else step_tokens)),
    )


def token_error_rate(
    task: CTCAlignmentLoss,
    recordings: Sequence[AudioRef],
    words: Sequence[Sequence[int]],
    audio_source: AudioFeatureSource,
) -> float:
    """Returns the token error rate of the greedy CTC decoding: all errors over the tokens of the transcripts.

    Args:
        task: The trained alignment task.
        recordings: Recordings.
        words: Tokens of each recording, as indices into the vocabulary, from 1 on.
        audio_source: Source of the audio features.
    """
    import jiwer

    batch = to_device(collate(recordings, words, audio_source), task.words.device)
    with torch.no_grad():
        likeliest = task.scores(batch["features"]).argmax(dim=-1)
    wrong = 0
    for own, expected in zip(torch.split(likeliest, batch["lengths"].tolist()), words, strict=True):
        named = [token for token in torch.unique_consecutive(own).tolist() if token]
        if named:
            counted = jiwer.process_words(" ".join(map(str, expected)), " ".join(map(str, named)))
            wrong += counted.substitutions + counted.deletions + counted.insertions
        else:  # jiwer does not accept an empty text.
            wrong += len(expected)
    return wrong / max(1, sum(map(len, words)))
