"""Cross-entropy over a large vocabulary without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 2048  # Positions whose logits are held at once.


def linear_cross_entropy(hidden_KW: Tensor, weight_VW: Tensor, bias_V: Tensor | None, targets_K: Tensor) -> Tensor:
    """Summed cross-entropy of a linear head, in nats, shape ().

    torch's own chunked form where it has one (2.14; it computes the gradients in the forward pass), else chunks whose
    logits are computed again in the backward pass.

    Args:
        hidden_KW: What the head is given.
        weight_VW: Of the head.
        bias_V: Of the head.
        targets_K: The right ids.
    """
    device = hidden_KW.device.type
    if torch.is_autocast_enabled(device):  # What the head would compute in; torch's chunked form casts nothing itself.
        dtype = torch.get_autocast_dtype(device)
        hidden_KW, weight_VW = hidden_KW.to(dtype), weight_VW.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
    with torch.autocast(device, enabled=False):
        own: Any = getattr(F, "linear_cross_entropy", None)
        if own is None or not torch.is_grad_enabled():
            return chunked(hidden_KW, weight_VW, bias_V, targets_K)
        options: Any = getattr(torch.nn, "LinearCrossEntropyOptions")()  # noqa: B009  # torch 2.14 has it
        loss: Tensor = own(hidden_KW, weight_VW, targets_K, linear_bias=bias_V, reduction="sum", options=options)
        return loss


def chunked(hidden_KW: Tensor, weight_VW: Tensor, bias_V: Tensor | None, targets_K: Tensor) -> Tensor:
    """The same by chunks of positions, for any torch."""

    def part(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight_VW, bias_V).float(), targets, reduction="sum")

    losses = []
    for hidden, targets in zip(torch.split(hidden_KW, CHUNK), torch.split(targets_K, CHUNK), strict=True):
        again = torch.is_grad_enabled() and len(hidden_KW) > CHUNK
        losses.append(checkpoint(part, hidden, targets, use_reentrant=False) if again else part(hidden, targets))
    return torch.stack(losses).sum()
