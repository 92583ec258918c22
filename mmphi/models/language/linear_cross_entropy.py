"""Cross-entropy over a large vocabulary without materialising all logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024  # Positions whose logits are in memory at once.


def linear_cross_entropy(
    hidden_KW: Tensor, weight_VW: Tensor, bias_V: Tensor | None, targets_K: Tensor, *, each: bool = False
) -> Tensor:
    """Summed cross-entropy of a linear head, in nats, shape (); with ``each`` that of each position, (K,).

    The gradients are computed in the forward pass, chunk by chunk while the logits exist, as in Liger kernels (Hsu et
    al. 2024, arXiv 2410.10989): nothing is computed twice, and only one chunk of logits is in memory. torch 2.14 has a
    similar function; its chunks shrink with the batch, and at 512 positions it is 28 times slower than all logits at
    once.

    Args:
        hidden_KW: Inputs of the head.
        weight_VW: Weight of the head.
        bias_V: Bias of the head, or ``None``.
        targets_K: Target token IDs.
        each: Whether to return the loss of each position. If the head is trained, this materialises all logits.
    """
    if each and (weight_VW.requires_grad or (bias_V is not None and bias_V.requires_grad)):
        return F.cross_entropy(F.linear(hidden_KW, weight_VW, bias_V).float(), targets_K, reduction="none")
    device = hidden_KW.device.type
    if torch.is_autocast_enabled(device):  # A custom autograd function has to cast its inputs.
        dtype = torch.get_autocast_dtype(device)
        hidden_KW, weight_VW = hidden_KW.to(dtype), weight_VW.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
    with torch.autocast(device, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(hidden_KW, weight_VW, bias_V, targets_K, each)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over the positions; weight gradients are summed in fp32."""

    @staticmethod
    def forward(
        ctx: Any, hidden_KW: Tensor, weight_VW: Tensor, bias_V: Tensor | None, targets_K: Tensor, each: bool
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        losses = torch.zeros(len(targets_K), dtype=torch.float32, device=hidden_KW.device)
        by_hidden = torch.empty_like(hidden_KW) if wanted else None
        learns, shifts = ctx.needs_input_grad[1:3]  # False for a frozen head.
        by_weight = torch.zeros_like(weight_VW, dtype=torch.float32) if learns else None
        by_bias = torch.zeros_like(bias_V, dtype=torch.float32) if shifts and bias_V is not None else None
        for first in range(0, len(targets_K), CHUNK):
            part = slice(first, first + CHUNK)
            hidden, targets = hidden_KW[part], targets_K[part]
            logits = F.linear(hidden, weight_VW, bias_V).float()
            norms = logits.logsumexp(dim=1, keepdim=True)
            losses[part] = norms[:, 0] - logits.gather(1, targets[:, None])[:, 0]
            if by_hidden is None:
                continue
            logits.sub_(norms).exp_()  # Probabilities; minus 1 at the target, the gradient.
            logits[torch.arange(len(targets), device=targets.device), targets] -= 1
            rounded = logits.to(hidden.dtype)
            by_hidden[part] = rounded @ weight_VW
            if by_weight is None:
                pass
            elif rounded.dtype == torch.float32:
                by_weight.addmm_(rounded.T, hidden)
            else:
                by_weight += rounded.T @ hidden
            if by_bias is not None:
                by_bias += logits.sum(dim=0)
        if wanted:
            ctx.save_for_backward(by_hidden, by_weight, by_bias)
            ctx.dtypes = weight_VW.dtype, None if bias_V is None else bias_V.dtype
        return losses if each else losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, by_weight, by_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        bias = None if by_bias is None else (by_bias * grad).to(bias_dtype)
        weight = None if by_weight is None else (by_weight * grad).to(weight_dtype)
        return by_hidden * grad[..., None].to(by_hidden.dtype), weight, bias, None, None
