"""Patch tokens of one layer, for every kind of vision encoder."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from mmphi.config.shared import VisionSettings
from mmphi.errors import ModelError


def layer_tokens(visual: Any, pixels_BCHW: Tensor, settings: VisionSettings) -> Tensor:
    """Tokens (B, tokens, width) of the chosen layer, row by row from the top left, after the CLS token if kept.

    Args:
        visual: An open_clip vision encoder.
        pixels_BCHW: Preprocessed images, on the encoder's device and in its dtype.
        settings: Layer, CLS policy, pooling.

    Raises:
        ModelError: If the encoder has no such layer, no CLS token to keep, or a grid that the pooling does not divide.
    """
    layer_of = _timm_layer if isinstance(visual, TimmModel) else _open_clip_layer
    inner = visual.trunk if isinstance(visual, TimmModel) else visual
    map_BDHW, cls_BPD = layer_of(inner, pixels_BCHW, settings.layer)
    pooled = _pool(map_BDHW, settings.pool).flatten(2).transpose(1, 2)
    if settings.cls == "keep":
        if cls_BPD is None:
            raise ModelError("vision.cls = keep, but this encoder has no CLS token", "use vision.cls = drop")
        pooled = torch.cat([cls_BPD[:, :1], pooled], dim=1)
    return pooled


def _pool(map_BDHW: Tensor, side: int) -> Tensor:
    height, width = map_BDHW.shape[2:]
    if height % side or width % side:
        fits = [str(n) for n in range(1, 17) if height % n == 0 and width % n == 0]
        raise ModelError(
            f"vision.pool = {side} does not divide the grid of {height} x {width} patches", f"use {', '.join(fits)}"
        )
    return nn.functional.avg_pool2d(map_BDHW, side) if side > 1 else map_BDHW


def _open_clip_layer(visual: Any, pixels_BCHW: Tensor, layer: int) -> tuple[Tensor, Tensor | None]:
    if not hasattr(visual, "forward_intermediates"):
        raise ModelError(
            f"{type(visual).__name__} cannot return the tokens of a layer", "use a ViT, ResNet or timm model"
        )
    outputs = visual.forward_intermediates(
        pixels_BCHW, indices=_layer_index(_depth(visual), layer), intermediates_only=True, output_extra_tokens=True
    )
    prefix = outputs.get("image_intermediates_prefix")
    return outputs["image_intermediates"][0], prefix[0] if prefix else None


def _depth(visual: Any) -> int:
    if hasattr(visual, "transformer"):
        return len(visual.transformer.resblocks)
    return 5  # open_clip's ResNets: the stem and four stages.


def _timm_layer(trunk: Any, pixels_BCHW: Tensor, layer: int) -> tuple[Tensor, Tensor | None]:
    """Blocks of a timm transformer; of a convolutional network its stages, with its final features as last layer."""
    if hasattr(trunk, "blocks") and hasattr(trunk, "patch_embed"):
        index = _layer_index(len(trunk.blocks), layer)
        # timm's PE raises UnboundLocalError if asked for prefix tokens that do not exist (1.0.31).
        prefix = bool(getattr(trunk, "num_prefix_tokens", 0))
        (outputs,) = trunk.forward_intermediates(
            pixels_BCHW, indices=index, intermediates_only=True, return_prefix_tokens=prefix
        )
        return outputs if isinstance(outputs, tuple) else (outputs, None)
    if layer == -1:
        features: Tensor = trunk.forward_features(pixels_BCHW)
        channels_last = str(getattr(trunk, "output_fmt", "NCHW")) == "NHWC"  # Swin's are (B, H, W, D).
        return features.permute(0, 3, 1, 2) if channels_last else features, None
    stages = len(trunk.feature_info)
    index = _layer_index(stages + 1, layer)
    return trunk.forward_intermediates(pixels_BCHW, indices=index, intermediates_only=True)[0], None


def _layer_index(depth: int, layer: int) -> list[int]:
    if -layer > depth:
        raise ModelError(f"vision.layer = {layer}, but the encoder has {depth} layers", f"use -{depth} to -1")
    return [depth + layer]
