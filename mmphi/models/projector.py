"""The layers between a vision encoder and a language model: the only part that learns to see."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmphi.errors import ModelError

Activation = Literal["gelu", "relu", "silu"]
LEAST = 1e-4  # Of the largest spread: less is noise of half precision.
ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


@dataclass(frozen=True)
class ProjectorConfig:
    """Shape of a projector.

    Attributes:
        input_width: Width D of the image features.
        output_width: Width W of the language model's embeddings.
        layers: Linear layers; 1 is LLaVA's linear projector, 2 LLaVA-1.5's MLP.
        width: Width of the layers between; 0 takes ``output_width``.
        activation: Between the layers.
        norm: Whether every feature vector is normalised first (towers without a final norm).
        dropout: Share of each linear layer's inputs dropped in training.
        whiten: Whether every channel's mean is taken off first and its spread made 1, as :meth:`Projector.fit` found
            them.
    """

    input_width: int
    output_width: int
    layers: int = 2
    width: int = 0
    activation: Activation = "gelu"
    norm: bool = False
    dropout: float = 0.0
    whiten: bool = False

    def size(self) -> int:
        """Trained parameters."""
        hidden = self.width or self.output_width
        widths = [self.input_width, *[hidden] * (self.layers - 1), self.output_width]
        linear = sum((before + 1) * after for before, after in pairwise(widths))
        return linear + (2 * self.input_width if self.norm else 0)

    def of_size(self, parameters: int) -> ProjectorConfig:
        """The same with the hidden width that comes nearest to a number of parameters.

        Raises:
            ModelError: If there is no hidden layer whose width could be chosen, or none of that size.
        """
        if self.layers == 1:
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
        return min(
            (replace(self, width=width) for width in (low, high)), key=lambda config: abs(config.size() - parameters)
        )


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
    """Maps features (..., D) of any float type to embeddings (..., W); weights and arithmetic are fp32.

    fp32 and never quantised: a projector in half precision loses small updates (LLaVA #433).
    """

    saveable = True

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.width or config.output_width
        widths = [config.input_width, *[hidden] * (config.layers - 1), config.output_width]
        modules: list[nn.Module] = [nn.LayerNorm(config.input_width)] if config.norm else []
        for i in range(config.layers):
            if i:
                modules.append(ACTIVATIONS[config.activation]())
            if config.dropout:
                modules.append(nn.Dropout(config.dropout))
            modules.append(nn.Linear(widths[i], widths[i + 1]))
        self.layers = nn.Sequential(*modules)
        self.whitening = Standardizer(config.input_width) if config.whiten else None

    def fit(self, features: Iterable[Tensor]) -> None:
        """Take means and spreads from features (..., D) as they will be met; nothing where they are not whitened."""
        if self.whitening is not None:
            self.whitening.fit(features)

    def forward(self, features: Tensor) -> Tensor:
        """Project features (..., D) to embeddings (..., W)."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            if self.whitening is not None:
                features = self.whitening(features)
            projected: Tensor = self.layers(features)
        return projected

    def save(self, folder: Path) -> None:
        """Write ``projector.safetensors`` and ``projector.json``, all that :meth:`load` needs."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "projector.safetensors")
        (folder / "projector.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Projector:
        """Read what :meth:`save` wrote.

        Raises:
            ModelError: If a file is missing, broken, of another shape, or holds values that are not finite.
        """
        try:
            config = ProjectorConfig(**json.loads((folder / "projector.json").read_text()))
            weights = load_file(folder / "projector.safetensors")
            projector = cls(config)
            projector.load_state_dict(weights)
        except (OSError, TypeError, ValueError, SafetensorError, RuntimeError) as error:
            raise ModelError(
                f"no projector can be read from {folder}: {error}", "train it anew with --force"
            ) from error
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise ModelError(f"{folder}/projector.safetensors: {name} is not finite", "train it anew with --force")
        return projector

    def check_fits(self, input_width: int, output_width: int) -> None:
        """Refuse features or a language model of another width.

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
