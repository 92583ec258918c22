"""Grounding: loss with the right image compared with the loss with another image."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmphi.data.schema import Example, ImageRef

if TYPE_CHECKING:
    from mmphi.models.multimodal import Multimodal


@dataclass(frozen=True)
class Grounding:
    """Losses with right and with shuffled inputs, in nats per token.

    Attributes:
        loss: Loss with the right inputs.
        shuffled_loss: Loss with the inputs of other examples.
    """

    loss: float
    shuffled_loss: float

    @property
    def gain(self) -> float:
        """Loss reduction by the right input, in nats per token; 0 for a model that ignores the input."""
        return self.shuffled_loss - self.loss

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return math.exp(self.loss)


def shuffled_images(examples: Sequence[Example], seed: int) -> list[tuple[ImageRef, ...]]:
    """Return a different image for each image of each example.

    The images are shuffled and each is replaced by the next one, cyclically, so that all examples of one image get the
    same other image. A single image is replaced by itself.
    """
    images = {image.id: image for e in examples for image in e.images}
    circle = sorted(images)
    random.Random(seed).shuffle(circle)
    following = dict(zip(circle, circle[1:] + circle[:1], strict=True))
    return [tuple(images[following[image.id]] for image in e.images) for e in examples]


def grounding(model: Multimodal, examples: Sequence[Example], seed: int = 0) -> Grounding:
    """Score a model with right and with shuffled images.

    Args:
        model: Model to score.
        examples: Conversations; the gain is meaningful with at least two different images.
        seed: Seed of the shuffle.
    """
    nats, tokens = model.losses(examples)
    other, _ = model.losses(examples, shuffled_images(examples, seed))
    return Grounding(nats / max(tokens, 1), other / max(tokens, 1))
