"""The same arithmetic in fewer passes over memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.activations import NewGELUActivation


class FusedGELU(nn.GELU):
    """Phi's activation in one operation."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")


def apply_patches(model: Any) -> Any:
    """Change what a model of transformers computes nowhere, and how often it goes through memory; return the model.

    - Phi's activation, which transformers writes as eight operations that each keep their input for the gradient, is
      one (``gelu`` with ``tanh``).
    - Norms give what they are given: autocast has them compute in fp32, and left so, all that follows them in a model
      whose weights are bf16 would be fp32 as well, where the model alone, without autocast, keeps bf16.

    Names of modules and parameters stay.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, FusedGELU())
        if isinstance(module, nn.LayerNorm) and cast_output_to_input_dtype not in module._forward_hooks.values():
            module.register_forward_hook(cast_output_to_input_dtype)
    return model


def cast_output_to_input_dtype(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """What a module says, in the precision of what it was given."""
    return output.to(inputs[0].dtype)


def remove_patches(model: Any) -> Any:
    """Undo :func:`apply_patches`: the model computes as whoever loads its weights by transformers has it; return it."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, FusedGELU):
                setattr(module, name, NewGELUActivation())
        for key, hook in list(module._forward_hooks.items()):
            if hook is cast_output_to_input_dtype:
                del module._forward_hooks[key]
    return model
