"""The layers between a vision encoder and a language model: the only part that learns to see."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmphi.config.projector import Activation, ProjectorKind, ProjectorSettings
from mmphi.errors import ModelError
from mmphi.models.projector_kinds import KINDS, MLP, ProjectorShape

LEAST = 1e-4  # Of the largest spread: less is noise of half precision.


@dataclass(frozen=True)
class ProjectorConfig:
    """Shape of a projector.

    Attributes:
        input_width: Width D of the image features.
        output_width: Width W of the language model's embeddings.
        layers: Linear layers; 1 is LLaVA's linear projector, 2 LLaVA-1.5's MLP. Of a resampler, blocks of attention.
        width: Width of the layers between; 0 takes ``output_width``.
        activation: Between the layers.
        norm: Whether every feature vector is normalised first (towers without a final norm).
        dropout: Share of each linear layer's inputs dropped in training.
        whiten: Whether every channel's mean is taken off first and its spread made 1, as :meth:`Projector.fit` found
            them.
        kind: One of :data:`mmphi.models.projector_kinds.KINDS`.
        input_tokens: Features per image; only ``mlp`` needs no number.
        merge: Side of the square of patches that become one token (``pixel_shuffle``, ``ldp_v2``).
        queries: Tokens per image (``resampler``).
    """

    input_width: int
    output_width: int
    layers: int = 2
    width: int = 0
    activation: Activation = "gelu"
    norm: bool = False
    dropout: float = 0.0
    whiten: bool = False
    kind: ProjectorKind = "mlp"
    input_tokens: int = 0
    merge: int = 2
    queries: int = 16

    @property
    def shape(self) -> ProjectorShape:
        """What the layers are built from."""
        return ProjectorShape(
            self.input_width,
            self.output_width,
            self.layers,
            self.width or self.output_width,
            self.activation,
            self.dropout,
            self.input_tokens,
            self.merge,
            self.queries,
        )

    def size(self) -> int:
        """Trained parameters."""
        with torch.device("meta"):
            layers: nn.Module = KINDS[self.kind](self.shape)
        return sum(p.numel() for p in layers.parameters()) + (2 * self.input_width if self.norm else 0)

    def of_size(self, parameters: int) -> ProjectorConfig:
        """The same with the hidden width that comes nearest to a number of parameters.

        Raises:
            ModelError: If there is no hidden layer whose width could be chosen, or none of that size.
        """
        if replace(self, width=64).size() == replace(self, width=128).size():
            raise ModelError(
                f"a projector of one layer has {self.size()} parameters, and no hidden width to give it {parameters}",
                "give it two layers or more, or leave projector.parameters at 0",
            )
        low, high = 1, 2
        while replace(self, width=high).size() < parameters:
            high *= 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if replace(self, width=middle).size() <= parameters else (low, middle)
        nearest = min(
            (replace(self, width=width) for width in (low, high)), key=lambda config: abs(config.size() - parameters)
        )
        if nearest.size() > 2 * parameters:
            raise ModelError(
                f"the smallest projector of kind {self.kind} has {replace(self, width=1).size()} parameters here, more"
                f" than {parameters}",
                "raise projector.parameters",
            )
        return nearest

    @property
    def unused(self) -> tuple[str, ...]:
        """Fields that have no effect on a projector of this kind."""
        uses = KINDS[self.kind].uses
        names = () if self.kind != "mlp" else ("kind", "input_tokens")  # As in projectors of earlier versions.
        return (*names, *(name for name in ("merge", "queries") if name not in uses))


class Standardizer(nn.Module):
    """Takes each channel's mean off features (..., D) and divides by its spread; until it is fitted it changes nothing.

    Channels of some encoders differ a hundredfold in size, and few large ones would speak for all.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))

    def fit(self, features: Iterable[Tensor]) -> None:
        """Mean and standard deviation of each channel; one that never changes is not divided.

        Args:
            features: Parts (..., D) of all that there are.
        """
        count, sums, squares = 0, torch.zeros(()), torch.zeros(())
        for part in features:
            rows = part.reshape(-1, part.shape[-1]).double()
            count, sums, squares = count + len(rows), sums + rows.sum(0), squares + rows.square().sum(0)
        if not count:
            return
        mean = sums / count
        spread = (squares / count - mean.square()).clamp(min=0).sqrt()
        self.mean.copy_(mean)
        self.spread.copy_(torch.where(spread > LEAST * spread.max(), spread, 1.0))

    def forward(self, features: Tensor) -> Tensor:
        """Whiten features (..., D)."""
        return (features - self.mean) / self.spread


class Projector(nn.Module):
    """Maps features of images, of any float type, to embeddings; weights and arithmetic are fp32.

    fp32 and never quantised: a projector in half precision loses small updates (LLaVA #433).
    """

    saveable = True

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config = config
        norm = nn.LayerNorm(config.input_width) if config.norm else None
        self.norm: nn.Module | None = None
        self.layers: Any
        if config.kind == "mlp":  # The norm is one of its layers, as earlier versions named its weights.
            self.layers = MLP(config.shape, [norm] if norm else [])
        else:
            self.layers, self.norm = KINDS[config.kind](config.shape), norm
        self.whitening = Standardizer(config.input_width) if config.whiten else None

    def fit(self, features: Iterable[Tensor]) -> None:
        """Take means and spreads from features (..., D) as they will be met; nothing where they are not whitened."""
        if self.whitening is not None:
            self.whitening.fit(features)

    def output_tokens(self, features: int) -> int:
        """Tokens of an image that has so many features.

        Raises:
            ModelError: If the projector was built for another number.
        """
        if self.config.kind == "mlp":
            return features
        if features != self.config.input_tokens:
            raise ModelError(
                f"the projector was trained for {self.config.input_tokens} features per image, not {features}",
                "use the vision settings that it was trained with",
            )
        return int(KINDS[self.config.kind].output_tokens(self.config.shape))

    def feature_rows(self, tokens: int) -> int:
        """Features that so many tokens of whole images are projected from; the inverse of :meth:`output_tokens`."""
        if self.config.kind == "mlp":
            return tokens
        return tokens // self.output_tokens(self.config.input_tokens) * self.config.input_tokens

    def forward(self, features: Tensor) -> Tensor:
        """Project features to embeddings.

        Args:
            features: Of images (N, T, D), or of whole images one after the other (N * T, D).

        Returns:
            Embeddings (N, T', W), or (N * T', W).
        """
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            if self.whitening is not None:
                features = self.whitening(features)
            if self.norm is not None:
                features = self.norm(features)
            count = self.config.input_tokens
            if count and (features.shape[-2] % count if features.dim() == 2 else features.shape[-2] != count):
                raise ModelError(
                    f"the projector was trained for {count} features per image, not {features.shape[-2]}",
                    "use the vision settings that it was trained with",
                )
            projected: Tensor
            if self.config.kind == "mlp" or features.dim() == 3:
                projected = self.layers(features)
            else:
                projected = self.layers(features.view(-1, self.config.input_tokens, features.shape[-1])).flatten(0, 1)
        return projected

    def scale_output(self, factor: float) -> None:
        """Multiply every output by a factor, by changing the weights."""
        self.layers.scale_output(factor)

    def save(self, folder: Path) -> None:
        """Write ``projector.safetensors`` and ``projector.json``, all that :meth:`load` needs."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "projector.safetensors")
        shape = asdict(self.config)
        # An MLP's as earlier versions wrote it: they can read it, and its digest stays.
        shape = {name: value for name, value in shape.items() if name not in self.config.unused}
        (folder / "projector.json").write_text(json.dumps(shape, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Projector:
        """Read what :meth:`save` wrote.

        Raises:
            ModelError: If a file is missing, broken, of another shape, or holds values that are not finite.
        """
        try:
            config = ProjectorConfig(**json.loads((folder / "projector.json").read_text()))
            if config.kind not in KINDS:
                raise ModelError(f"{folder}: projectors of kind {config.kind} are not known here", "update mmphi")
            weights = load_file(folder / "projector.safetensors")
            projector = cls(config)
            projector.load_state_dict(weights)
        except (OSError, TypeError, ValueError, SafetensorError, RuntimeError) as error:
            raise ModelError(
                f"no projector can be read from {folder}: {error}", "train it again with --force"
            ) from error
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise ModelError(f"{folder}/projector.safetensors: {name} is not finite", "train it again with --force")
        return projector

    def check_fits(self, input_width: int, output_width: int, tokens: int = 0) -> None:
        """Refuse features or a language model of another width, or another number of features per image.

        Raises:
            ModelError: Naming both widths.
        """
        for what, have, want in (
            ("image features", input_width, self.config.input_width),
            ("the language model", output_width, self.config.output_width),
        ):
            if have != want:
                raise ModelError(
                    f"the projector was trained for {what} of width {want}, not {have}",
                    "use the settings it was trained with, or train a projector for these",
                )
        if tokens:
            self.output_tokens(tokens)


def projector_config(
    settings: ProjectorSettings, input_width: int, output_width: int, input_tokens: int
) -> ProjectorConfig:
    """The projector that settings describe.

    Args:
        settings: Kind and shape.
        input_width: Width of the image features.
        output_width: Width of the language model's embeddings.
        input_tokens: Features per image.

    Raises:
        ModelError: If the features or the wanted size do not fit the kind.
    """
    names = ("layers", "width", "activation", "norm", "dropout", "kind", "merge", "queries")
    config = ProjectorConfig(
        input_width,
        output_width,
        **{name: getattr(settings, name) for name in names},
        whiten=settings.standardize,
        input_tokens=0 if settings.kind == "mlp" else input_tokens,
    )
    KINDS[config.kind].output_tokens(config.shape)  # Refuses features that it cannot read.
    return config.of_size(settings.parameters) if settings.parameters else config
