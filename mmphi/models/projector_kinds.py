"""Projector kinds: layers from the features of whole images to embeddings, with as many or fewer tokens.

A new kind is one class with the methods of :class:`ProjectorLayers`, one line in :data:`KINDS`, and a name in
:data:`mmphi.config.projector.ProjectorKind`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from mmphi.config.projector import Activation, ProjectorKind
from mmphi.errors import ModelError

ACTIVATIONS: Mapping[Activation, Callable[[], nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}
HEAD_WIDTH = 64  # Width of the resampler's attention heads, approximately.


@dataclass(frozen=True)
class ProjectorShape:
    """Shape that the layers of a projector are built from.

    Attributes:
        input_width: Width D of the image features.
        output_width: Width W of the language model's embeddings.
        layers: Linear layers, or attention blocks.
        width: Hidden width.
        activation: Activation between the layers.
        dropout: Dropout rate of each linear layer's inputs; of the attention weights in a resampler.
        input_tokens: Features T per image; 0 if every feature is projected separately.
        merge: Side of the square of neighbouring patches that is merged into one token.
        queries: Tokens per image of a resampler.
    """

    input_width: int
    output_width: int
    layers: int
    width: int
    activation: Activation
    dropout: float
    input_tokens: int
    merge: int
    queries: int

    def grid(self) -> int:
        """Side of the square grid of patches.

        Raises:
            ModelError: If the features are not a square grid that ``merge`` divides.
        """
        side = isqrt(self.input_tokens)
        if self.input_tokens == 1:
            raise ModelError("an image has only one feature, so there is nothing to merge", "use projector.kind = mlp")
        if side * side != self.input_tokens or not side:
            raise ModelError(
                f"{self.input_tokens} features per image are not a square grid of patches",
                "leave CLS and register tokens out of the features (vision.cls = drop), or use kind resampler",
            )
        if side % self.merge:
            fits = ", ".join(str(n) for n in range(1, side + 1) if side % n == 0)
            raise ModelError(
                f"projector.merge = {self.merge} does not divide the grid of {side} x {side}", f"use {fits}"
            )
        return side


class ProjectorLayers(Protocol):
    """Interface of a projector kind.

    Attributes:
        uses: Kind-specific settings that this kind uses.
    """

    uses: tuple[str, ...]

    def __init__(self, shape: ProjectorShape) -> None: ...

    def __call__(self, features: Tensor) -> Tensor:
        """Embeddings (N, T', W) of the features (N, T, D) of images."""

    @staticmethod
    def output_tokens(shape: ProjectorShape) -> int:
        """Tokens T' per image."""

    def scale_output(self, factor: float) -> None:
        """Multiply every output by a factor."""


class MLP(nn.Sequential):
    """Linear layers applied to each feature (..., D): LLaVA's projector with one layer, LLaVA-1.5's with two."""

    uses: ClassVar[tuple[str, ...]] = ()

    def __init__(self, shape: ProjectorShape, before: Sequence[nn.Module] = ()) -> None:
        widths = [shape.input_width, *[shape.width] * (shape.layers - 1), shape.output_width]
        modules = list(before)
        for i in range(shape.layers):
            if i:
                modules.append(ACTIVATIONS[shape.activation]())
            if shape.dropout:
                modules.append(nn.Dropout(shape.dropout))
            modules.append(nn.Linear(widths[i], widths[i + 1]))
        super().__init__(*modules)

    @staticmethod
    def output_tokens(shape: ProjectorShape) -> int:
        """Tokens per image: as many as features."""
        return shape.input_tokens

    @torch.no_grad()
    def scale_output(self, factor: float) -> None:
        """See :class:`ProjectorLayers`."""
        last = next(layer for layer in reversed(list(self)) if isinstance(layer, nn.Linear))
        last.weight.mul_(factor)
        last.bias.mul_(factor)


class PixelShuffleMLP(nn.Module):
    """Concatenates the features of each square of patches and applies an MLP: fewer tokens without averaging.

    Features are a square grid, row by row. Used by InternVL 1.5 (Chen et al. 2024, arXiv 2404.16821) and SmolVLM
    (Marafioti et al. 2025, arXiv 2504.05299).
    """

    uses: ClassVar[tuple[str, ...]] = ("merge",)

    def __init__(self, shape: ProjectorShape) -> None:
        super().__init__()
        self.grid, self.merge = shape.grid(), shape.merge
        merged = replace(shape, input_width=shape.input_width * shape.merge**2)
        self.mlp = MLP(merged)

    @staticmethod
    def output_tokens(shape: ProjectorShape) -> int:
        """Tokens per image: one per square of patches."""
        return (shape.grid() // shape.merge) ** 2

    def forward(self, features: Tensor) -> Tensor:
        """See :class:`ProjectorLayers`."""
        count, side, merge, width = len(features), self.grid, self.merge, features.shape[-1]
        squares = features.view(count, side // merge, merge, side // merge, merge, width).transpose(2, 3)
        projected: Tensor = self.mlp(squares.reshape(count, (side // merge) ** 2, merge * merge * width))
        return projected

    def scale_output(self, factor: float) -> None:
        """See :class:`ProjectorLayers`."""
        self.mlp.scale_output(factor)


class LDPv2(nn.Module):
    """MobileVLM V2's projector (Chu et al. 2024, arXiv 2402.03766): MLP, average pooling, and a residual convolution.

    Features are a square grid, row by row. The depthwise 3 x 3 convolution encodes positions.
    """

    uses: ClassVar[tuple[str, ...]] = ("merge",)

    def __init__(self, shape: ProjectorShape) -> None:
        super().__init__()
        self.grid = shape.grid()
        self.mlp = MLP(shape)
        self.pool = nn.AvgPool2d(shape.merge)
        self.position = nn.Conv2d(shape.output_width, shape.output_width, 3, padding=1, groups=shape.output_width)

    @staticmethod
    def output_tokens(shape: ProjectorShape) -> int:
        """Tokens per image: one per square of patches."""
        return (shape.grid() // shape.merge) ** 2

    def forward(self, features: Tensor) -> Tensor:
        """See :class:`ProjectorLayers`."""
        projected: Tensor = self.mlp(features)
        pooled = self.pool(projected.transpose(1, 2).reshape(len(features), projected.shape[-1], self.grid, self.grid))
        tokens: Tensor = (pooled + self.position(pooled)).flatten(2).transpose(1, 2)
        return tokens

    @torch.no_grad()
    def scale_output(self, factor: float) -> None:
        """See :class:`ProjectorLayers`."""
        self.mlp.scale_output(factor)  # The layers after it are linear, except for one bias.
        assert self.position.bias is not None
        self.position.bias.mul_(factor)


class Resampler(nn.Module):
    """Learned queries that attend to the features of an image: as many tokens as there are queries, for any grid.

    Like the perceiver resampler of Flamingo (Alayrac et al. 2022, arXiv 2204.14198), with learned feature positions.
    Dropout is applied to the attention weights.
    """

    uses: ClassVar[tuple[str, ...]] = ("queries",)

    def __init__(self, shape: ProjectorShape) -> None:
        super().__init__()
        heads = max(1, shape.width // HEAD_WIDTH)
        width = shape.width - shape.width % heads
        self.widen = nn.Linear(shape.input_width, width)
        self.positions = nn.Parameter(torch.randn(shape.input_tokens, width) * width**-0.5)
        self.queries = nn.Parameter(torch.randn(shape.queries, width) * width**-0.5)
        self.blocks = nn.ModuleList(_CrossAttention(width, heads, shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, shape.output_width)

    @staticmethod
    def output_tokens(shape: ProjectorShape) -> int:
        """Tokens per image: one per query."""
        return shape.queries

    def forward(self, features: Tensor) -> Tensor:
        """See :class:`ProjectorLayers`."""
        read = self.widen(features) + self.positions
        tokens = self.queries.expand(len(features), -1, -1)
        for block in self.blocks:
            tokens = block(tokens, read)
        projected: Tensor = self.out(self.norm(tokens))
        return projected

    @torch.no_grad()
    def scale_output(self, factor: float) -> None:
        """See :class:`ProjectorLayers`."""
        self.out.weight.mul_(factor)
        self.out.bias.mul_(factor)


class _CrossAttention(nn.Module):
    """Pre-norm residual block: attention of queries to features and to each other, then a feed-forward layer."""

    def __init__(self, width: int, heads: int, shape: ProjectorShape) -> None:
        super().__init__()
        self.query_norm, self.feature_norm, self.inner_norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, heads, dropout=shape.dropout, batch_first=True)
        self.inner = nn.Sequential(
            nn.Linear(width, 2 * width), ACTIVATIONS[shape.activation](), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        queries = self.query_norm(tokens)
        keys = torch.cat([self.feature_norm(features), queries], dim=1)
        tokens = tokens + self.attention(queries, keys, keys, need_weights=False)[0]
        changed: Tensor = tokens + self.inner(self.inner_norm(tokens))
        return changed


KINDS: Mapping[ProjectorKind, type[Any]] = {
    "mlp": MLP,
    "pixel_shuffle": PixelShuffleMLP,
    "ldp_v2": LDPv2,
    "resampler": Resampler,
}
"""Projector layers by the value of the setting ``projector.kind``."""
