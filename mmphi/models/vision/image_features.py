"""Image features as they are stored: fp16, by the digest of the image's content."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mmphi.errors import ModelError
from mmphi.models.device import copy_to_cpu_async
from mmphi.models.vision.vision_encoder import VisionEncoder

Embedded = tuple[dict[str, Tensor], dict[str, str]]  # Features by digest; reasons by digest of unusable images.


def features_of(pixels: Mapping[str, Tensor], encoder: VisionEncoder) -> dict[str, Tensor]:
    """Features (tokens, width) in fp16 of pixels (3, H, W), by digest.

    Raises:
        ModelError: If they do not fit in fp16.
    """
    return features_async(list(pixels), torch.stack(list(pixels.values())), encoder)() if pixels else {}


def features_async(
    names: Sequence[str], pixels_BCHW: Tensor, encoder: VisionEncoder
) -> Callable[[], dict[str, Tensor]]:
    """Start the computation of features without waiting for the accelerator.

    Args:
        names: Digest of each image.
        pixels_BCHW: Preprocessed images.
        encoder: Vision encoder.

    Returns:
        Function that returns the features (tokens, width) in fp16, by digest; it raises a ModelError if they do not fit
        in fp16.
    """
    computed = encoder(pixels_BCHW).half()
    fit, features = copy_to_cpu_async(computed.isfinite().all()), copy_to_cpu_async(computed)

    def found() -> dict[str, Tensor]:
        if not fit():
            raise ModelError("the encoder's features do not fit in fp16", "use another vision.layer or model")
        return dict(zip(names, features(), strict=True))

    return found
