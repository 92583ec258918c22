"""4-bit layers on a processor, whose weights are dequantised once and not in every pass.

A GPU dequantises faster than it reads plain weights. A processor does not: of SmolLM2-135M's 106 million weights in
NF4 it took as long as multiplying 330 tokens by them, in every forward pass, in every backward pass, and for every
token that is written. What is computed is the same: NF4's values, in the precision that the layer asks for.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

SHARE = 0.5  # Of the memory that is free: more is left quantised.


def dequantize_layers_once(model: Any) -> Any:
    """Let the 4-bit layers of a model that are on a processor keep their weights dequantised beside them.

    The layers stay what they are for whoever saves, merges or counts them. Where the memory that is free would not hold
    the weights twice, all are left alone.

    Args:
        model: A Hugging Face model, frozen.

    Returns:
        The same model.
    """
    # A model with 4-bit layers has imported it; for any other it would take as long as all else that loading does.
    if "bitsandbytes" not in sys.modules:
        return model
    from bitsandbytes.nn import Linear4bit

    layers = [m for m in model.modules() if isinstance(m, Linear4bit) and m.weight.device.type == "cpu"]
    layers = [m for m in layers if m.compute_dtype is not None]  # Else the first inputs are to decide.
    size = sum(m.compute_dtype.itemsize * m.in_features * m.out_features for m in layers)
    if size <= SHARE * psutil.virtual_memory().available:
        for layer in layers:
            # A method of one layer, not of its class; and no buffer of it, which would be saved with it.
            layer.forward = partial(_linear, layer, _plain(layer))
    return model


@torch.no_grad()
def _plain(layer: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight.to(layer.compute_dtype)


def _linear(layer: Any, weight: Tensor, inputs: Tensor) -> Tensor:
    """Outputs (..., out) of inputs (..., in), in their precision."""
    bias = None if layer.bias is None else layer.bias.to(weight.dtype)
    return F.linear(inputs.to(weight.dtype), weight, bias).to(inputs.dtype)
