"""Naming what images show before it is told: features learn which of the language model's embeddings they are.

Of every image it is known which words its captions use, and not where they are seen. Each place of an image names words
by a softmax over the language model's own embeddings, above how often they are used anyway, and the image by the mean
of its places: a mixture, so that one place may name the dog and another one the grass. The language model itself takes
no part, so a step costs little; what it makes of such embeddings is learned afterwards. Learning from captions as bags
of words is Joulin et al. 2016 (arXiv:1511.02251).
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

WORDS = 4096  # Of the language model's tokens, those that captions use most.
AT_ONCE = 1 << 25  # Scores in memory at once: 128 MB.


@dataclass(frozen=True)
class CaptionWords:
    """An image, and how many of its captions use each word.

    Attributes:
        image: What is seen.
        words: Places in the vocabulary.
        counts: How many captions use each of them.
    """

    image: ImageRef
    words: tuple[int, ...]
    counts: tuple[int, ...]


class CaptionAlignmentBatch(TypedDict):
    """Images and their words: features (N, P, D), words and counts (S,) of one image after the other."""

    features: Tensor
    words: Tensor  # int64 (S,), places in the vocabulary
    counts: Tensor  # float32 (S,)
    lengths: Tensor  # int64 (N,), words of each image
    step_tokens: Tensor


class BagOfWordsAlignmentLoss(nn.Module):
    """The summed loss of images against the words of their captions.

    Args:
        projector: What is trained.
        embeddings: Those of the vocabulary, (V, W), frozen.
        usage: How often each word of it is used, (V,), positive.
    """

    words: Tensor
    usual: Tensor

    def __init__(self, projector: Projector, embeddings: Tensor, usage: Tensor) -> None:
        super().__init__()
        self.projector = projector
        self.register_buffer("words", F.normalize(embeddings.float(), dim=-1))
        self.register_buffer("usual", (usage.float() / usage.sum()).log())
        self.sharpness = nn.Parameter(torch.tensor(2.5))  # Logarithm of what cosines are multiplied by: 12 at first.

    def places(self, features: Tensor) -> Tensor:
        """Log-probabilities (N, P, V) of every word at each place of images (N, P, D)."""
        return self._scores(F.normalize(self.projector(features), dim=-1))

    def _scores(self, projected: Tensor) -> Tensor:
        return F.log_softmax(projected @ self.words.T * self.sharpness.exp() + self.usual, dim=-1)

    def images(self, features: Tensor) -> Tensor:
        """Log-probabilities (N, V) of every word in images (N, P, D): the mean of their places."""
        projected = F.normalize(self.projector(features), dim=-1)
        some = max(1, AT_ONCE // (projected.shape[1] * len(self.words)))

        def mean(part: Tensor) -> Tensor:
            return torch.logsumexp(self._scores(part), dim=1) - math.log(part.shape[1])

        # Scores of all places are computed again in the backward pass: they are a thousand times what they come from.
        return torch.cat([checkpoint(mean, part, use_reentrant=False) for part in torch.split(projected, some)])

    def forward(self, features: Tensor, words: Tensor, counts: Tensor, lengths: Tensor, **_: Tensor) -> Tensor:
        """Summed nats of the captions' words, shape ()."""
        image = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        return -(self.images(features)[image, words] * counts).sum()


class CaptionAlignmentDataset(Dataset[CaptionAlignmentBatch]):
    """The images of every optimiser step, by index: a pure function of them, seed and step.

    Args:
        images: With their words.
        features: Where features come from.
        steps: Optimiser steps.
        batch_size: Images per step, over all processes.
        seed: Seed of the order.
        views: Of each image, in turn from one time to the next that it is seen.
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
    """Images and their words as one batch.

    Args:
        images: With their words.
        features: Where features come from.
        step_tokens: Words of the whole step, with their counts; those of these images where left out.
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
    """Images with the words of their captions.

    Args:
        language: Whose tokenizer.
        images: With their captions.
        known: The vocabulary; where there is none, the tokens that most captions use.

    Returns:
        The vocabulary, as token ids, and the images that have a word of it.
    """
    own, placed = token_vocabulary(language, [text for _, texts in images for text in texts])
    uses, first = list[Counter[int]](), 0
    for _, texts in images:
        said = placed[first : first + len(texts)]
        uses.append(Counter(own[place - 1] for words in said for place in set(words)))
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
    """How often each of ``size`` words is used, (size,), one of none a little."""
    usage = torch.full((size,), 0.1)
    for one in images:
        usage[list(one.words)] += torch.tensor(one.counts, dtype=torch.float32)
    return usage


@torch.no_grad()
def alignment_loss(
    task: BagOfWordsAlignmentLoss, images: Sequence[CaptionWords], features: ImageFeatures, at_once: int = 64
) -> float:
    """Nats per word of images' captions."""
    nats, words = 0.0, 0.0
    for first in range(0, len(images), at_once):
        batch = collate(images[first : first + at_once], features)
        moved = {name: value.to(task.words.device) for name, value in batch.items()}  # type: ignore[attr-defined]
        nats += float(task(**moved))
        words += float(batch["counts"].sum())
    return nats / max(1.0, words)


@torch.no_grad()
def match_embedding_norm(projector: Projector, features: Tensor, size: float) -> None:
    """Scale a projector's last layer so that what it makes of features (N, P, D) is of such a mean norm."""
    training, device = projector.training, next(projector.parameters()).device
    projector.eval()
    norm = projector(features.to(device)).norm(dim=-1).mean().clamp(min=1e-9)
    projector.train(training)
    projector.scale_output(size / float(norm))
