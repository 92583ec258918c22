"""Layer norms that return the dtype of their input.

Autocast computes them in fp32, so that in a bf16 model everything after them would be fp32, too, whereas the model
without autocast stays in bf16.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def cast_output_to_input_dtype(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Forward hook: the module's output in the dtype of its first input."""
    return output.to(inputs[0].dtype)


def apply_layer_norm_dtype(model: Any) -> bool:
    """Register the hook on all layer norms of a model; returns whether one was without it."""
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    without = [norm for norm in norms if cast_output_to_input_dtype not in norm._forward_hooks.values()]
    for norm in without:
        norm.register_forward_hook(cast_output_to_input_dtype)
    return bool(without)


def remove_layer_norm_dtype(model: Any) -> None:
    """Undo :func:`apply_layer_norm_dtype`."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if hook is cast_output_to_input_dtype:
                del module._forward_hooks[key]
