"""The section of a small CLIP that is trained here."""

from __future__ import annotations

from typing import Literal

from mmphi.config.section import setting
from mmphi.config.shared import TrainingSettings


class LightClipSettings(TrainingSettings):
    """A small CLIP trained here with open_clip's own loss."""

    image_tower: str = setting("", "timm model name; empty trains one from nothing")
    from_nothing: Literal["resnet", "vit"] = setting("resnet", "kind of the tower trained from nothing")
    image_weights: str = setting("", "safetensors file of the vision encoder's weights", file="path")
    text_tower: str = setting(
        "", "Hugging Face folder of the text tower; empty trains a small transformer from nothing", file="path"
    )
    lock_image: bool = setting(False, "keep the vision encoder's weights as they are")
    lock_text: bool = setting(False, "keep the text tower's weights as they are")
    image_size: int = setting(64, "side of the input image", unit="px", ge=16, le=1024)
    patch_size: int = setting(8, "side of a patch (ViT)", unit="px", ge=2)
    width: int = setting(128, "width of the towers trained from nothing", unit="units", ge=16)
    layers: int = setting(4, "layers of the towers trained from nothing", unit="layers", ge=1, le=64)
    embed_dim: int = setting(128, "width of the shared space", unit="units", ge=8)
    context_length: int = setting(
        32, "longest caption of a text tower trained from nothing; more of it is cut off", unit="tokens", ge=4, le=512
    )
    steps: int = setting(600, "optimiser steps", unit="steps", ge=1)
    batch_size: int = setting(128, "images per step, over all processes", unit="images", ge=2)
    gradient_accumulation_steps: int = setting(
        1, "always 1: a contrastive loss needs its whole batch at once", ge=1, le=1, formerly="accumulation"
    )
    captions: int = setting(1, "captions of each image per step", unit="captions", ge=1, le=16)
    weight_decay: float = setting(0.1, "AdamW's weight decay", ge=0, le=1)
    warmup_ratio: float = setting(0.05, "share of the steps that warm up", ge=0, lt=1, formerly="warmup")
    beta2: float = setting(0.98, "AdamW's second decay rate", gt=0, lt=1)
    dropout: float = setting(0.0, "share of a locked tower's outputs dropped in training", ge=0, lt=1)
    workers: int = setting(2, "processes that decode images", unit="processes", affects_key=False, ge=0)
