"""Attention of one new token a text without copies of keys: its heads stand beside each other as queries would.

Models whose heads share keys (grouped-query attention) have transformers copy each key and value for every head that
reads it wherever there is a mask. A step that writes reads all that was said before, for one token: the copies are most
of its work. Heads that share keys ask the same keys, as several tokens do; so they are given as tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    """What ``sdpa`` computes; where each row has one token and heads share keys, without copies.

    Args:
        module: The attention layer.
        query_RHTD: Of the new tokens, (rows, heads, tokens, head width).
        key_RGSD: Of all that they see, (rows, groups of heads, seen, head width).
        value_RGSD: Likewise.
        attention_mask: (rows, 1, tokens, seen), or none.
        **kwargs: transformers' own.

    Returns:
        (rows, tokens, heads, head width), and no weights.
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


@contextmanager
def gqa_decode_attention_applied(model: Any) -> Iterator[None]:
    """Let a model that attends by ``sdpa`` attend so, until the end; any other is left as it is."""
    before = model.config._attn_implementation
    if before != "sdpa":
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
