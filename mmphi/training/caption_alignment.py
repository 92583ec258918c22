"""Bag-of-words alignment of projected image features with the language model's token embeddings.

Captions give the words of an image, but not their positions. Each position of an image predicts a word by a softmax
over the language model's embeddings, with the words' log frequencies as bias. The image's distribution is the mean over
its positions, so that one position may predict "dog" and another one "grass". The language model itself is not run, so
a step is cheap; training through it follows. Learning from captions as bags of words is Joulin et al. 2016
(arXiv:1511.02251).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from mmphi.data.features import ImageFeatures
from mmphi.data.schema import ImageRef
from mmphi.models.projector import Projector
from mmphi.training.packed_dataset import ShuffledOrder
from mmphi.training.token_vocabulary import token_vocabulary
from mmphi.training.training_args import world_size

WORDS = 4096  # Size of the vocabulary: the tokens that most captions use.
AT_ONCE = 1 << 25  # Scores in memory at once: 128 MB.


@dataclass(frozen=True)
class CaptionWords:
    """An image and the words of its captions.

    Attributes:
        image: The image.
        words: Indices into the vocabulary.
        counts: Number of captions that use each word.
    """

    image: ImageRef
    words: tuple[int, ...]
    counts: tuple[int, ...]


class CaptionAlignmentBatch(TypedDict):
    """Images and their words: features (N, P, D); words and counts (S,), concatenated over the images."""

    features: Tensor
    words: Tensor  # int64 (S,), indices into the vocabulary
    counts: Tensor  # float32 (S,)
    lengths: Tensor  # int64 (N,), number of words of each image
    step_tokens: Tensor


class BagOfWordsAlignmentLoss(nn.Module):
    """Summed negative log-likelihood of caption words, given image features.

    Args:
        projector: The trained module.
        embeddings: Token embeddings of the vocabulary, (V, W), frozen.
        usage: Frequency of each word of the vocabulary, (V,), positive.
    """

    words: Tensor
    usual: Tensor

    def __init__(self, projector: Projector, embeddings: Tensor, usage: Tensor) -> None:
        super().__init__()
        self.projector = projector
        self.register_buffer("words", F.normalize(embeddings.float(), dim=-1))
        self.register_buffer("usual", (usage.float() / usage.sum()).log())
        self.sharpness = nn.Parameter(torch.tensor(2.5))  # Log of the scale of the cosines, initially 12.

    def places(self, features: Tensor) -> Tensor:
        """Log-probabilities (N, P, V) of every word at each position of images (N, P, D)."""
        return self._scores(F.normalize(self.projector(features), dim=-1))

    def _scores(self, projected: Tensor) -> Tensor:
        return F.log_softmax(projected @ self.words.T * self.sharpness.exp() + self.usual, dim=-1)

    def images(self, features: Tensor) -> Tensor:
        """Log-probabilities (N, V) of every word in images (N, P, D), averaged over positions as probabilities."""
        projected = F.normalize(self.projector(features), dim=-1)
        some = max(1, AT_ONCE // (projected.shape[1] * len(self.words)))

        def mean(part: Tensor) -> Tensor:
            return torch.logsumexp(self._scores(part), dim=1) - math.log(part.shape[1])

        # Scores are recomputed in the backward pass: they are a thousand times larger than their inputs.
        return torch.cat([checkpoint(mean, part, use_reentrant=False) for part in torch.split(projected, some)])

    def forward(self, features: Tensor, words: Tensor, counts: Tensor, lengths: Tensor, **_: Tensor) -> Tensor:
        """Summed negative log-likelihood of the caption words, in nats, shape ()."""
        image = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        return -(self.images(features)[image, words] * counts).sum()


class CaptionAlignmentDataset(Dataset[CaptionAlignmentBatch]):
    """Batches of images by index, as a pure function of images, seed and step.

    Args:
        images: Images with their words.
        features: Source of the image features.
        steps: Optimiser steps.
        batch_size: Images per step, over all processes.
        seed: Seed of the order.
        views: Number of augmented views per image, used in rotation over epochs.
    """

    def __init__(
        self,
        images: Sequence[CaptionWords],
        features: ImageFeatures,
        *,
        steps: int,
        batch_size: int,
        seed: int,
        views: int = 1,
    ) -> None:
        self.images, self.features, self.steps, self.views = images, features, steps, views
        self.batch_size = batch_size
        self.chosen = ShuffledOrder(len(images), batch_size, seed).chosen

    def __len__(self) -> int:
        return self.steps * world_size()

    def __getitem__(self, index: int) -> CaptionAlignmentBatch:
        step, share = divmod(index, world_size())
        chosen, first = self.chosen(step), step * self.batch_size
        seen = [
            replace(one, image=replace(one.image, view=(number + (first + place) // len(self.images)) % self.views))
            for place, number in enumerate(chosen)
            for one in [self.images[number]]
        ]
        return collate(seen[share :: world_size()], self.features, sum(sum(one.counts) for one in seen))


def collate(
    images: Sequence[CaptionWords], features: ImageFeatures, step_tokens: int | None = None
) -> CaptionAlignmentBatch:
    """Returns images and their words as one batch.

    Args:
        images: Images with their words.
        features: Source of the image features.
        step_tokens: Sum of the word counts of the whole step; by default that of these images.
    """
    own = sum(sum(one.counts) for one in images)
    return CaptionAlignmentBatch(
        features=features.get([one.image for one in images]),
        words=torch.tensor([word for one in images for word in one.words], dtype=torch.long),
        counts=torch.tensor([count for one in images for count in one.counts], dtype=torch.float32),
        lengths=torch.tensor([len(one.words) for one in images]),
        step_tokens=torch.tensor(float(own if step_tokens is None else step_tokens)),
    )


def caption_words(
    language: Any, images: Sequence[tuple[ImageRef, Sequence[str]]], known: Sequence[int] = ()
) -> tuple[list[int], list[CaptionWords]]:
    """Returns a vocabulary, and images with the words of their captions.

    Args:
        language: Language model whose tokenizer is used.
        images: Images with their captions.
        known: Vocabulary as token IDs; if empty, the tokens that most captions use.

    Returns:
        The vocabulary as token IDs, and the images that have at least one word of it.
    """
    own, placed = token_vocabulary(language, [text for _, texts in images for text in texts])
    uses, first = list[Counter[int]](), 0
    for _, texts in images:
        positions = placed[first : first + len(texts)]
        uses.append(Counter(own[place - 1] for words in positions for place in set(words)))
        first += len(texts)
    if not known:
        usage = Counter[int]()
        for one in uses:  # A sum of counters would copy all words for every image.
            usage.update(one)
        known = sorted(sorted(usage, key=lambda token: (-usage[token], token))[:WORDS])
    place_of = {token: place for place, token in enumerate(known)}
    found = []
    for (image, _), used in zip(images, uses, strict=True):
        words = {place_of[token]: count for token, count in sorted(used.items()) if token in place_of}
        if words:
            found.append(CaptionWords(image, tuple(words), tuple(words.values())))
    return list(known), found


def word_frequencies(images: Sequence[CaptionWords], size: int) -> Tensor:
    """Returns the number of uses of each of ``size`` words, plus 0.1 so that none is zero, (size,)."""
    usage = torch.full((size,), 0.1)
    for one in images:
        usage[list(one.words)] += torch.tensor(one.counts, dtype=torch.float32)
    return usage


@torch.no_grad()
def alignment_loss(
    task: BagOfWordsAlignmentLoss, images: Sequence[CaptionWords], features: ImageFeatures, at_once: int = 64
) -> float:
    """Returns the loss per caption word, in nats."""
    nats, words = 0.0, 0.0
    for first in range(0, len(images), at_once):
        batch = collate(images[first : first + at_once], features)
        moved = {name: value.to(task.words.device) for name, value in batch.items()}  # type: ignore[attr-defined]
        nats += float(task(**moved))
        words += float(batch["counts"].sum())
    return nats / max(1.0, words)


@torch.no_grad()
def match_embedding_norm(projector: Projector, features: Tensor, size: float) -> None:
    """Scale a projector's last layer so that its outputs for features (N, P, D) have the mean norm ``size``."""
    training, device = projector.training, next(projector.parameters()).device
    projector.eval()
    norm = projector(features.to(device)).norm(dim=-1).mean().clamp(min=1e-9)
    projector.train(training)
    projector.scale_output(size / float(norm))
