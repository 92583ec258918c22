"""Phi's activation as one operation.

In transformers it is eight operations that each keep their input for the gradient.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.activations import NewGELUActivation


class FusedGELU(nn.GELU):
    """GELU with the tanh approximation, as one operation."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")


def apply_fused_gelu(model: Any) -> bool:
    """Replace a model's ``NewGELUActivation`` by :class:`FusedGELU`; returns whether it had any."""
    return _replace(model, NewGELUActivation, FusedGELU)


def remove_fused_gelu(model: Any) -> None:
    """Undo :func:`apply_fused_gelu`."""
    _replace(model, FusedGELU, NewGELUActivation)


def _replace(model: Any, kind: type[nn.Module], other: type[nn.Module]) -> bool:
    found = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, kind)
    ]
    for module, name in found:
        setattr(module, name, other())
    return bool(found)
