"""Patches of transformers' modules that give the same results with fewer passes over memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.activations import NewGELUActivation


class FusedGELU(nn.GELU):
    """Phi's activation as one operation."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")


def apply_patches(model: Any) -> Any:
    """Patch a transformers model in place for fewer passes over memory, with the same results; returns the model.

    - Phi's activation, in transformers eight operations that each keep their input for the gradient, becomes one
      (``gelu`` with ``tanh``).
    - Layer norms return the dtype of their input. Autocast computes them in fp32, so that in a bf16 model everything
      after them would be fp32, too, whereas the model without autocast stays in bf16.

    Names of modules and parameters do not change.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, FusedGELU())
        if isinstance(module, nn.LayerNorm) and cast_output_to_input_dtype not in module._forward_hooks.values():
            module.register_forward_hook(cast_output_to_input_dtype)
    return model


def cast_output_to_input_dtype(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Forward hook: the module's output in the dtype of its first input."""
    return output.to(inputs[0].dtype)


def remove_patches(model: Any) -> Any:
    """Undo :func:`apply_patches`, so that the model computes as transformers loads it; returns the model."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, FusedGELU):
                setattr(module, name, NewGELUActivation())
        for key, hook in list(module._forward_hooks.items()):
            if hook is cast_output_to_input_dtype:
                del module._forward_hooks[key]
    return model
