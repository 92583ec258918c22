"""Whether the model looks: its loss with the right image beside its loss with another one."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mmphi.data.schema import Example, ImageRef


class Scores(Protocol):
    """A model that can be scored on conversations."""

    def losses(
        self, examples: Sequence[Example], images: Sequence[tuple[ImageRef, ...]] | None = None
    ) -> tuple[float, int]:
        """Summed nats and supervised tokens, with other images in place of the examples' own where given."""


@dataclass(frozen=True)
class Grounding:
    """Loss in nats per token, and what the right image is worth.

    Attributes:
        loss: With the right images.
        shuffled_loss: With the images of other examples.
    """

    loss: float
    shuffled_loss: float

    @property
    def gain(self) -> float:
        """Nats per token that the right image saves; 0 for a model that ignores it."""
        return self.shuffled_loss - self.loss

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return math.exp(self.loss)


def shuffled_images(examples: Sequence[Example], seed: int) -> list[tuple[ImageRef, ...]]:
    """For each image of each example another one, never the same; examples without image keep none.

    All examples of one image get the same other image: the images are put in a circle at random and each moves on by
    one. With a single image there is no other, and it stays.
    """
    images = {image.id: image for e in examples for image in e.images}
    circle = sorted(images)
    random.Random(seed).shuffle(circle)
    following = dict(zip(circle, circle[1:] + circle[:1], strict=True))
    return [tuple(images[following[image.id]] for image in e.images) for e in examples]


def grounding(model: Scores, examples: Sequence[Example], seed: int = 0) -> Grounding:
    """Score a model with right and with shuffled images.

    Args:
        model: What to score.
        examples: Conversations, about at least two images for the gain to mean anything.
        seed: Seed of the shuffle.
    """
    nats, tokens = model.losses(examples)
    other, _ = model.losses(examples, shuffled_images(examples, seed))
    return Grounding(nats / max(tokens, 1), other / max(tokens, 1))
