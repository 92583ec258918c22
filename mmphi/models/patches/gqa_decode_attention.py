"""Grouped-query attention in decode steps without copies of keys and values.

With a mask, transformers copies each key and value for every head that shares it. A decode step reads the whole cache
for one token, so these copies are most of its work. Here, heads that share keys are passed to attention as if they were
tokens of one head.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "grouped"


def gqa_decode_attention(
    module: Any,
    query_RHTD: Tensor,
    key_RGSD: Tensor,
    value_RGSD: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Same results as ``sdpa``, without copies where each row has one token and heads share keys.

    Args:
        module: The attention layer.
        query_RHTD: Queries of the new tokens, (rows, heads, tokens, head width).
        key_RGSD: Keys of all positions in the cache, (rows, key/value heads, positions, head width).
        value_RGSD: Values, likewise.
        attention_mask: Mask (rows, 1, tokens, positions), or ``None``.
        **kwargs: Further arguments of transformers' attention functions.

    Returns:
        Outputs (rows, tokens, heads, head width), and ``None`` in place of the attention weights.
    """
    rows, heads, tokens, width = query_RHTD.shape
    groups = key_RGSD.shape[1]
    if tokens > 1 or heads == groups or kwargs.get("dropout"):
        output, _ = sdpa_attention_forward(module, query_RHTD, key_RGSD, value_RGSD, attention_mask, **kwargs)
        return output, None
    query = query_RHTD.reshape(rows, groups, heads // groups, width)
    output = F.scaled_dot_product_attention(
        query, key_RGSD, value_RGSD, attn_mask=attention_mask, scale=kwargs.get("scaling")
    )
    return output.reshape(rows, 1, heads, width), None


AttentionInterface.register(NAME, gqa_decode_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def apply_gqa_decode_attention(model: Any) -> bool:
    """Use this attention in a model with ``sdpa``; returns whether it is one. Other models are not changed."""
    if _implementation(model) != "sdpa":
        return False
    model.set_attn_implementation(NAME)
    return True


def remove_gqa_decode_attention(model: Any) -> None:
    """Undo :func:`apply_gqa_decode_attention`."""
    if _implementation(model) == NAME:
        model.set_attn_implementation("sdpa")


def _implementation(model: Any) -> str:
    """Attention implementation of a transformers model; empty for another module."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
