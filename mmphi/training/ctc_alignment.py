"""Naming words before they are used: frames learn which of the language model's embeddings they are, at little cost.

Connectionist temporal classification (Graves et al. 2006) with the language model's own embedding table as the output
layer: what a feature is projected to shall lie near the embedding of the token that is spoken there, or near one more
vector that means nothing is. The language model itself takes no part, so a step costs little; what it makes of such
embeddings is learned afterwards, from its own predictions.
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
from mmphi.models.audio.audio_projector import SpeechProjection
from mmphi.text.packing import to_device
from mmphi.training.packed_dataset import ShuffledOrder
from mmphi.training.training_args import world_size


class CTCBatch(TypedDict):
    """Recordings and their words: features (P, D) one recording after the other, tokens (S,) likewise."""

    features: Tensor
    lengths: Tensor  # int64 (N,), features of each recording
    tokens: Tensor  # int64 (S,), places in the vocabulary of words that are spoken, from 1 on
    token_lengths: Tensor  # int64 (N,)
    step_tokens: Tensor


class CTCAlignmentLoss(nn.Module):
    """The summed CTC loss of recordings against their words.

    Args:
        projection: What is trained.
        embeddings: Those of the words that are spoken, (V, W), frozen.
    """

    words: Tensor

    def __init__(self, projection: SpeechProjection, embeddings: Tensor) -> None:
        super().__init__()
        self.projection = projection
        unit = F.normalize(embeddings.float(), dim=-1)
        self.register_buffer("words", unit)
        self.nothing = nn.Parameter(unit.mean(dim=0))
        self.sharpness = nn.Parameter(torch.tensor(2.5))  # Logarithm of what cosines are multiplied by: 12 at first.

    def scores(self, features: Tensor) -> Tensor:
        """Log-probabilities (P, 1 + V) of nothing and of every word, at each feature."""
        projected = F.normalize(self.projection(features), dim=-1)
        table = torch.cat([F.normalize(self.nothing, dim=-1)[None], self.words])
        return F.log_softmax(projected @ table.T * self.sharpness.exp(), dim=-1)

    def forward(self, features: Tensor, lengths: Tensor, tokens: Tensor, token_lengths: Tensor, **_: Tensor) -> Tensor:
        """Summed nats, shape (); recordings too short for their words count nothing."""
        scores = nn.utils.rnn.pad_sequence(list(torch.split(self.scores(features), lengths.tolist())))
        return F.ctc_loss(scores, tokens, lengths, token_lengths, blank=0, reduction="sum", zero_infinity=True)


class CTCAlignmentDataset(Dataset[CTCBatch]):
    """The recordings of every optimiser step, by index: a pure function of them, seed and step.

    Args:
        recordings: What is heard.
        words: Tokens of each, as places in the vocabulary of words that are spoken, from 1 on.
        audio_source: Where features come from.
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
    """Recordings and their words as one batch.

    Args:
        recordings: What is heard.
        words: Tokens of each, as places in the vocabulary of words that are spoken, from 1 on.
        audio_source: Where features come from.
        step_tokens: Words of the whole step; those of these recordings where left out.
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
    """Tokens that are wrong, missing or too many in what frames name, over those that are said.

    Args:
        task: What was trained.
        recordings: What is heard.
        words: Tokens of each.
        audio_source: Where features come from.
    """
    import jiwer

    batch = to_device(collate(recordings, words, audio_source), task.words.device)
    with torch.no_grad():
        likeliest = task.scores(batch["features"]).argmax(dim=-1)
    wrong = 0
    for own, said in zip(torch.split(likeliest, batch["lengths"].tolist()), words, strict=True):
        named = [token for token in torch.unique_consecutive(own).tolist() if token]
        if named:
            counted = jiwer.process_words(" ".join(map(str, said)), " ".join(map(str, named)))
            wrong += counted.substitutions + counted.deletions + counted.insertions
        else:  # jiwer takes no empty text.
            wrong += len(said)
    return wrong / max(1, sum(map(len, words)))
