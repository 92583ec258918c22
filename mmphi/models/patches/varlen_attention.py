"""Variable-length attention for documents that are concatenated in one row, without attention across their borders.

It is registered as an attention implementation of transformers. Without borders, as in generation, it is transformers'
own ``sdpa``.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "documents"
BEFORE = "_attention_before_varlen"  # Attribute of a patched model: its former attention implementation.


def varlen_attention(
    module: Any,
    query_RHTD: Tensor,
    key_RHTD: Tensor,
    value_RHTD: Tensor,
    attention_mask: Tensor | None,
    borders: Tensor | None = None,
    longest: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document of one row.

    Args:
        module: The attention layer.
        query_RHTD: Queries of one row, (1, heads, tokens, head width).
        key_RHTD: Keys, (1, key/value heads, tokens, head width).
        value_RHTD: Values, likewise.
        attention_mask: Mask for calls without borders, else unused.
        borders: Start of each document and end of the last one, int32 (documents + 1,).
        longest: Tokens of the longest document.
        **kwargs: Further arguments of transformers' attention functions.

    Returns:
        Outputs (1, tokens, heads, head width), and ``None`` in place of the attention weights.
    """
    if borders is None:
        output, _ = sdpa_attention_forward(module, query_RHTD, key_RHTD, value_RHTD, attention_mask, **kwargs)
        return output, None
    scale = kwargs.get("scaling")
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key_RHTD, value_RHTD = repeat_kv(key_RHTD, groups), repeat_kv(value_RHTD, groups)
    # Rotary embeddings under autocast leave queries and keys in fp32.
    query_RHTD, key_RHTD = query_RHTD.to(value_RHTD.dtype), key_RHTD.to(value_RHTD.dtype)
    if query_RHTD.is_cuda and query_RHTD.dtype in (torch.bfloat16, torch.float16):
        query, key, value = (x[0].transpose(0, 1) for x in (query_RHTD, key_RHTD, value_RHTD))
        return _varlen(query, key, value, borders, longest, scale)[None], None
    # torch.split, because the gradient of each slice would be a tensor of the whole row, added to all others.
    documents = borders.diff().tolist()
    one_by_one = [
        F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        for query, key, value in zip(
            *(torch.split(x, documents, dim=2) for x in (query_RHTD, key_RHTD, value_RHTD)), strict=True
        )
    ]
    return torch.cat(one_by_one, dim=2).transpose(1, 2), None


def _varlen(query_THD: Tensor, key_THD: Tensor, value_THD: Tensor, borders: Tensor, longest: int, scale: Any) -> Tensor:
    """Variable-length flash attention of torch; its argument for causality differs between versions."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    if "scale" in known:
        causal["scale"] = scale
    attend: Any = varlen_attn
    output: Tensor = attend(query_THD, key_THD, value_THD, borders, borders, longest, longest, **causal)
    return output


AttentionInterface.register(NAME, varlen_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def apply_varlen_attention(model: Any) -> bool:
    """Set a model's attention implementation to :func:`varlen_attention`; returns whether it was another one.

    Layers that are recomputed in the backward pass look up the implementation again, so the patch must stay applied
    until then.
    """
    before = model.config._attn_implementation
    if before == NAME:
        return False
    model.set_attn_implementation(NAME)
    vars(model)[BEFORE] = before
    return True


def remove_varlen_attention(model: Any) -> None:
    """Undo :func:`apply_varlen_attention`."""
    if BEFORE in vars(model):
        model.set_attn_implementation(vars(model).pop(BEFORE))
