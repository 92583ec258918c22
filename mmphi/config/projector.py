"""The section of the projector between image features and language model."""

from __future__ import annotations

from typing import Literal

from mmphi.config.section import setting
from mmphi.config.shared import ConversationSettings

Activation = Literal["gelu", "relu", "silu"]
ProjectorKind = Literal["mlp", "pixel_shuffle", "ldp_v2", "resampler"]  # See mmphi/models/projector_kinds.py.
KIND_SETTINGS = ("merge", "queries")  # Settings that only some kinds use: see `uses` of each kind.


class ProjectorSettings(ConversationSettings):
    """The layers between image features and language model, trained with both frozen."""

    features: Literal["cached", "live"] = setting("cached", "stored features, or computed in every step")
    kind: ProjectorKind = setting(
        "mlp",
        "mlp keeps the tokens of an image; pixel_shuffle and ldp_v2 make one of each square of them, resampler a fixed"
        " number",
        legacy_default="mlp",
    )
    merge: int = setting(2, "side of the square (pixel_shuffle, ldp_v2)", unit="patches", ge=1, le=16, legacy_default=2)
    queries: int = setting(16, "tokens of an image (resampler)", unit="tokens", ge=1, le=1024, legacy_default=16)
    layers: int = setting(
        2, "linear layers: 1 is linear, 2 is LLaVA-1.5's; blocks of attention of a resampler", unit="layers", ge=1, le=8
    )
    width: int = setting(0, "hidden width; 0 takes the language model's", unit="units", ge=0)
    parameters: int = setting(0, "choose the hidden width for about this number of parameters; 0 takes `width`", ge=0)
    activation: Activation = setting("gelu", "activation function between the layers")
    norm: bool = setting(False, "normalise every feature vector before the first layer")
    dropout: float = setting(
        0.0, "share of each layer's inputs (resampler: attention weights) dropped in training", ge=0, lt=1
    )
    compile: Literal["auto", "yes", "no"] = setting(
        "auto",
        "compile the frozen language model's layers with torch.compile; auto: on a GPU, in 16 bit",
        affects_key=False,
    )
    num_augmentations: int = setting(
        1,
        "augmented views of each training image, used in turn: the image, then random crops, half of them mirrored",
        ge=1,
        legacy_default=1,
        formerly="views",
    )
    standardize: bool = setting(
        False,
        "give every channel of the features mean 0 and spread 1 over the training images",
        legacy_default=False,
        formerly="whiten",
    )
    alignment_steps: int = setting(
        0,
        "steps of the alignment warm-up on the words of captions, before the training; 0 for none",
        unit="steps",
        ge=0,
        legacy_default=0,
        formerly="align_steps",
    )
    alignment_batch_size: int = setting(
        128,
        "images per step of the alignment warm-up",
        unit="images",
        ge=1,
        legacy_default=128,
        formerly="align_batch_size",
    )
    alignment_learning_rate: float = setting(
        2e-3,
        "peak learning rate of the alignment warm-up",
        gt=0,
        le=1,
        legacy_default=2e-3,
        formerly="align_learning_rate",
    )
