"""Estimates of disk space and GPU memory of a training, from model sizes; loads and downloads nothing."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from mmphi.config import LanguageSettings, VisionSettings
from mmphi.config.declared_view import SettingsView
from mmphi.config.pretrain import PretrainSettings
from mmphi.config.projector import ProjectorSettings
from mmphi.config.qlora import QloraSettings
from mmphi.config.shared import ConversationSettings
from mmphi.errors import ModelError
from mmphi.models.language.phi import SIZES, PhiSize, parameters_of
from mmphi.stages.estimates import feature_shape

CHECKPOINT_BYTES = 16  # Per trained parameter in fp32: result, checkpoint, and AdamW's two moments.
TRAINED_BYTES = 16  # Per trained parameter in memory: weight, gradient, and two moments, all fp32.
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "8bit": 1.0, "4bit": 0.5}
# Bytes kept for the backward pass per token, layer and hidden unit in 16 bits. Measured at Phi-2's shape
# (docs/explanation/benchmarks.md): 23.7 GB for a projector under a frozen model, 46 GB for an adapter on all linear
# layers.
FROZEN_ACTIVATION_BYTES, ADAPTER_ACTIVATION_BYTES = 19, 46
UNKNOWN_FEATURE_WIDTH = 1024  # Assumed for encoders that must be built first; the width of CLIP's ViT-L.
BLOCK_INPUT_BYTES = 2  # With gradient checkpointing, only the input of each layer is kept.


@dataclass(frozen=True)
class LanguageSize:
    """The sizes of a language model that determine the cost of a training.

    Attributes:
        layers: Transformer layers.
        width: Hidden width.
        ffn: Inner width of the feed-forward layers.
        matrices: Matrices per feed-forward layer: 2, or 3 if gated.
        vocabulary: Rows of the embedding matrix.
        tied: Whether the output head shares the embedding's weights.
    """

    layers: int
    width: int
    ffn: int
    matrices: int
    vocabulary: int
    tied: bool

    @property
    def linear(self) -> int:
        """Parameters of the linear layers, assuming as many key and value heads as query heads."""
        return self.layers * (4 * self.width**2 + self.matrices * self.width * self.ffn)

    @property
    def embeddings(self) -> int:
        """Parameters of embedding and output head."""
        return self.vocabulary * self.width * (1 if self.tied else 2)

    def weight_bytes(self, precision: str) -> float:
        """Bytes of the weights; under quantisation, embedding and output head stay in 16 bits."""
        of_embeddings = max(WEIGHT_BYTES[precision], 2.0)
        return WEIGHT_BYTES[precision] * self.linear + of_embeddings * self.embeddings

    def lora_parameters(self, rank: int) -> int:
        """Parameters of a low-rank adapter on all linear layers."""
        return self.layers * rank * (8 * self.width + self.matrices * (self.width + self.ffn))


def language_size(settings: SettingsView) -> LanguageSize | None:
    """Sizes of the model of stage ``pretrain``, of Phi-2, or from a local config.json; ``None`` if unknown."""
    name = settings(LanguageSettings).model
    if name == "pretrain":
        chosen = settings(PretrainSettings)
        shape = SIZES.get(chosen.size) or PhiSize(chosen.layers, chosen.width, chosen.heads, chosen.tied)
        embedding = parameters_of(shape, *([chosen.vocabulary] if chosen.vocabulary else [])).embedding
        return LanguageSize(shape.layers, shape.width, 4 * shape.width, 2, embedding // shape.width, shape.tied)
    if name == "microsoft/phi-2":
        shape = SIZES["phi-2"]
        rows = parameters_of(shape).embedding // shape.width
        return LanguageSize(shape.layers, shape.width, 4 * shape.width, 2, rows, shape.tied)
    file = Path(name) if name.endswith(".json") else Path(name) / "config.json"
    try:
        config = json.loads(file.read_bytes())
        width = int(config["hidden_size"])
        return LanguageSize(
            int(config["num_hidden_layers"]),
            width,
            int(config.get("intermediate_size") or 4 * width),
            2 if config.get("model_type", "").startswith("phi") else 3,
            int(config["vocab_size"]),
            bool(config.get("tie_word_embeddings", False)),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # The stage that loads it reports the error.


def projector_parameters(settings: SettingsView) -> int:
    """Parameters of the projector; 0 if they depend on a language model of unknown size."""
    chosen, language = settings(ProjectorSettings), language_size(settings)
    if chosen.parameters:
        return chosen.parameters
    _, features = feature_shape(settings)
    if language is None:
        return 0
    if chosen.kind != "mlp":
        from mmphi.models.projector import projector_config  # It imports torch, which takes seconds.

        tokens, width = feature_shape(settings)
        try:
            return projector_config(chosen, width or UNKNOWN_FEATURE_WIDTH, language.width, tokens).size()
        except ModelError:
            return 0  # The stage's check reports the error.
    hidden = chosen.width or language.width
    widths = [features or UNKNOWN_FEATURE_WIDTH, *[hidden] * (chosen.layers - 1), language.width]
    norm = 2 * widths[0] if chosen.norm else 0
    return norm + sum(before * after + after for before, after in itertools.pairwise(widths))


def copied_bytes(settings: SettingsView) -> int:
    """Bytes of the language model and the light CLIP copied into a result's folder if stages here train them."""
    from mmphi.stages.light_clip import cost as light_clip_cost

    language, copied = language_size(settings), 0.0
    if settings(LanguageSettings).model == "pretrain" and language is not None:
        copied += WEIGHT_BYTES["fp32"] * (language.linear + language.embeddings)
    if settings(VisionSettings).model == "light_clip":
        copied += light_clip_cost(settings).disk_bytes * WEIGHT_BYTES["fp32"] / CHECKPOINT_BYTES
    return round(copied)


def projector_disk(settings: SettingsView) -> int:
    """Bytes written by a projector's training: weights, a checkpoint, and the alignment warm-up's checkpoint."""
    warm_up = settings(ProjectorSettings).alignment_steps > 0
    return CHECKPOINT_BYTES * (1 + warm_up) * projector_parameters(settings) + copied_bytes(settings)


def adapter_disk(settings: SettingsView) -> int:
    """Bytes written by an adapter's training, including its copy of the projector."""
    language = language_size(settings)
    lora = language.lora_parameters(settings(QloraSettings).rank) if language else 0
    return CHECKPOINT_BYTES * (lora + projector_parameters(settings)) + copied_bytes(settings)


def projector_memory(settings: SettingsView) -> int:
    """Upper bound on the GPU memory of a projector's training, in bytes; 0 if the language model's size is unknown."""
    language, chosen = language_size(settings), settings(ProjectorSettings)
    if language is None:
        return 0
    weights = language.weight_bytes(settings(LanguageSettings).precision)
    activations = _activation_bytes(language, chosen, FROZEN_ACTIVATION_BYTES)
    return round(weights + activations + TRAINED_BYTES * projector_parameters(settings))


def adapter_memory(settings: SettingsView) -> int:
    """Upper bound on the GPU memory of an adapter's training, in bytes; 0 if the language model's size is unknown."""
    language, chosen = language_size(settings), settings(QloraSettings)
    if language is None:
        return 0
    trained = language.lora_parameters(chosen.rank) + projector_parameters(settings)
    activations = _activation_bytes(language, chosen, ADAPTER_ACTIVATION_BYTES)
    return round(language.weight_bytes(chosen.base_precision) + activations + TRAINED_BYTES * trained)


def _activation_bytes(language: LanguageSize, chosen: ConversationSettings, each: int) -> float:
    """Bytes kept for one backward pass if every sequence has the maximum length."""
    tokens = chosen.batch_size // chosen.gradient_accumulation_steps * chosen.max_length
    one_layer = tokens * language.width * each * (2 if chosen.precision == "fp32" else 1)
    if not chosen.gradient_checkpointing:
        return language.layers * one_layer
    return one_layer + tokens * language.width * language.layers * BLOCK_INPUT_BYTES
