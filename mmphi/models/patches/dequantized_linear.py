"""4-bit layers on a CPU whose weights are dequantised once instead of in every pass.

A GPU dequantises faster than it reads plain weights. A CPU does not: dequantising SmolLM2-135M's 106 million weights in
NF4 took as long as multiplying 330 tokens by them, in every forward pass, in every backward pass, and for every
generated token. The results are the same: NF4's values in the layer's compute precision.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

SHARE = 0.5  # Largest share of the available memory; models that need more stay quantised.


def dequantize_layers_once(model: Any) -> Any:
    """Keep dequantised copies of the weights of a model's 4-bit layers on the CPU, and compute with them.

    The layers remain 4-bit layers when they are saved, merged or counted. If the copies would take more than half of
    the available memory, no layer is changed. The change cannot be undone.

    Args:
        model: A Hugging Face model, frozen.

    Returns:
        The same model.
    """
    # A model with 4-bit layers has imported it already; importing it takes as long as the rest of loading.
    if "bitsandbytes" not in sys.modules:
        return model
    from bitsandbytes.nn import Linear4bit

    layers = [m for m in model.modules() if isinstance(m, Linear4bit) and m.weight.device.type == "cpu"]
    layers = [m for m in layers if m.compute_dtype is not None]  # Otherwise the first inputs determine it.
    size = sum(m.compute_dtype.itemsize * m.in_features * m.out_features for m in layers)
    if size <= SHARE * psutil.virtual_memory().available:
        for layer in layers:
            # Patches the instance, not the class; a buffer would be saved with the layer.
            layer.forward = partial(_linear, layer, _plain(layer))
    return model


@torch.no_grad()
def _plain(layer: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight.to(layer.compute_dtype)


def _linear(layer: Any, weight: Tensor, inputs: Tensor) -> Tensor:
    """Outputs (..., out) of inputs (..., in), in the dtype of the inputs."""
    bias = None if layer.bias is None else layer.bias.to(weight.dtype)
    return F.linear(inputs.to(weight.dtype), weight, bias).to(inputs.dtype)
