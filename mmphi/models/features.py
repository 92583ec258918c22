"""Features of images as they are stored: in half precision, by the digests of the images' contents."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmphi.errors import ModelError
from mmphi.models.vision import Tower

Embedded = tuple[dict[str, Tensor], dict[str, str]]  # Features by digest; reasons by digest of what is no image.


def features_of(pixels: Mapping[str, Tensor], tower: Tower) -> dict[str, Tensor]:
    """Features (tokens, width) in fp16 of pixels (3, H, W), by digest.

    Raises:
        ModelError: If they do not fit in fp16.
    """
    if not pixels:
        return {}
    computed = tower(torch.stack(list(pixels.values()))).half().cpu()
    if not computed.isfinite().all():
        raise ModelError("the tower's features do not fit in fp16", "use another vision.layer or model")
    return dict(zip(pixels, computed, strict=True))
