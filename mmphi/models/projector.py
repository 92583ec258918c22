"""Projector: the trained layers between a vision encoder and a language model."""

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

LEAST = 1e-4  # Relative to the largest standard deviation; smaller ones are noise of half precision.


@dataclass(frozen=True)
class ProjectorConfig:
    """Shape of a projector.

    Attributes:
        input_width: Width D of the image features.
        output_width: Width W of the language model's embeddings.
        layers: Linear layers; 1 is LLaVA's linear projector, 2 LLaVA-1.5's MLP. Attention blocks of a resampler.
        width: Hidden width; 0 takes ``output_width``.
        activation: Activation between the layers.
        norm: Whether feature vectors pass a LayerNorm first (for encoders without a final norm).
        dropout: Dropout rate of each linear layer's inputs; of the attention weights in a resampler.
        whiten: Whether channels are standardized first, with the statistics found by :meth:`Projector.fit`.
        kind: One of :data:`mmphi.models.projector_kinds.KINDS`.
        input_tokens: Features per image; not needed by ``mlp``.
        merge: Side of the square of patches that is merged into one token (``pixel_shuffle``, ``ldp_v2``).
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
        """Shape that the layers are built from, with the hidden width resolved."""
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
        """Number of trained parameters."""
        with torch.device("meta"):
            layers: nn.Module = KINDS[self.kind](self.shape)
        return sum(p.numel() for p in layers.parameters()) + (2 * self.input_width if self.norm else 0)

    def of_size(self, parameters: int) -> ProjectorConfig:
        """Returns this configuration with the hidden width whose parameter count is nearest to ``parameters``.

        Raises:
            ModelError: If there is no hidden layer, or the nearest count is more than twice ``parameters``.
        """
        if replace(self, width=64).size() == replace(self, width=128).size():
            raise ModelError(
                f"a projector of one layer has {self.size()} parameters, and no hidden width to make it {parameters}",
                "use two layers or more, or set projector.parameters to 0",
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
        names = () if self.kind != "mlp" else ("kind", "input_tokens")  # Absent in files of earlier versions.
        return (*names, *(name for name in ("merge", "queries") if name not in uses))


class Standardizer(nn.Module):
    """Subtracts each channel's mean from features (..., D) and divides by its standard deviation.

    It is the identity until it is fitted. Channels of some encoders differ in scale by a factor of 100, and a few large
    ones would dominate.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))

    def fit(self, features: Iterable[Tensor]) -> None:
        """Set the mean and standard deviation of each channel; constant channels are not divided.

        Args:
            features: All features, in batches (..., D).
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
        """Standardize features (..., D)."""
        return (features - self.mean) / self.spread


class Projector(nn.Module):
    """Maps image features of any float type to embeddings; weights and arithmetic are fp32.

    The weights are never quantised: a projector in half precision loses small updates (LLaVA #433).
    """

    saveable = True

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config = config
        norm = nn.LayerNorm(config.input_width) if config.norm else None
        self.norm: nn.Module | None = None
        self.layers: Any
        if config.kind == "mlp":  # With the norm among the layers, weights keep the names of earlier versions.
            self.layers = MLP(config.shape, [norm] if norm else [])
        else:
            self.layers, self.norm = KINDS[config.kind](config.shape), norm
        self.whitening = Standardizer(config.input_width) if config.whiten else None

    def fit(self, features: Iterable[Tensor]) -> None:
        """Fit the standardizer to batches (..., D) of features; without one, do nothing."""
        if self.whitening is not None:
            self.whitening.fit(features)

    def output_tokens(self, features: int) -> int:
        """Number of tokens that an image with ``features`` features becomes.

        Raises:
            ModelError: If the projector was built for another number of features.
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
        """Number of features that ``tokens`` tokens of whole images come from; the inverse of :meth:`output_tokens`."""
        if self.config.kind == "mlp":
            return tokens
        return tokens // self.output_tokens(self.config.input_tokens) * self.config.input_tokens

    def forward(self, features: Tensor) -> Tensor:
        """Project features to embeddings.

        Args:
            features: Features of images (N, T, D), or of whole images concatenated (N * T, D).

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
        """Write ``projector.safetensors`` and ``projector.json`` for :meth:`load`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "projector.safetensors")
        shape = asdict(self.config)
        # Without unused fields, earlier versions can read an MLP, and its digest does not change.
        shape = {name: value for name, value in shape.items() if name not in self.config.unused}
        (folder / "projector.json").write_text(json.dumps(shape, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Projector:
        """Load a projector that :meth:`save` wrote.

        Raises:
            ModelError: If a file is missing, corrupt, of another shape, or contains non-finite values.
        """
        try:
            config = ProjectorConfig(**json.loads((folder / "projector.json").read_text()))
            if config.kind not in KINDS:
                raise ModelError(f"{folder}: unknown projector kind {config.kind}", "update mmphi")
            weights = load_file(folder / "projector.safetensors")
            projector = cls(config)
            projector.load_state_dict(weights)
        except (OSError, TypeError, ValueError, SafetensorError, RuntimeError) as error:
            raise ModelError(
                f"the projector in {folder} cannot be loaded: {error}", "train it again with --force"
            ) from error
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise ModelError(f"{folder}/projector.safetensors: {name} is not finite", "train it again with --force")
        return projector

    def check_fits(self, input_width: int, output_width: int, tokens: int = 0) -> None:
        """Check the widths of both sides and, unless ``tokens`` is 0, the number of features per image.

        Raises:
            ModelError: If one differs from what the projector was built for.
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
    """Projector configuration from settings.

    Args:
        settings: Settings of the kind and shape.
        input_width: Width of the image features.
        output_width: Width of the language model's embeddings.
        input_tokens: Features per image.

    Raises:
        ModelError: If the features or the requested number of parameters do not fit the kind.
    """
    names = ("layers", "width", "activation", "norm", "dropout", "kind", "merge", "queries")
    config = ProjectorConfig(
        input_width,
        output_width,
        **{name: getattr(settings, name) for name in names},
        whiten=settings.standardize,
        input_tokens=0 if settings.kind == "mlp" else input_tokens,
    )
    KINDS[config.kind].output_tokens(config.shape)  # Raises if the kind does not accept these features.
    return config.of_size(settings.parameters) if settings.parameters else config
