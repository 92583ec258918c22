"""The same arithmetic in fewer passes over memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.activations import NewGELUActivation


def fewer_passes(model: Any) -> Any:
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
                setattr(module, name, nn.GELU(approximate="tanh"))
        if isinstance(module, nn.LayerNorm) and as_given not in module._forward_hooks.values():
            module.register_forward_hook(as_given)
    return model


def as_given(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """What a module says, in the precision of what it was given."""
    return output.to(inputs[0].dtype)
