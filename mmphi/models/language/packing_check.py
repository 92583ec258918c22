"""Check that a language model gives the same logits for packed sequences as for each alone."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mmphi.models.packed_vlm import PackedVLM
from mmphi.text.packing import ROWS, Layout, PackedBatch

PROBE = (7, 11)  # Lengths of the sequences that packing is tested with.


def probe_rows(weight: Tensor) -> PackedBatch:
    """Test sequences in one row, with token IDs of the embedding's weight (V, W); every token is a target."""
    ids = torch.arange(sum(PROBE), device=weight.device) * 37 % max(2, weight.shape[0] - 1)
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate(PROBE)])[None].to(weight.device)
    positions = torch.cat([torch.arange(n) for n in PROBE])[None].to(weight.device)
    return PackedBatch(
        input_ids=ids[None],
        position_ids=positions,
        segments=segments,
        features={},
        places={},
        keep=torch.arange(len(ids), device=weight.device),
        targets=ids,
        step_tokens=torch.tensor(1.0),
        borders=torch.tensor([0, *accumulate(PROBE)], dtype=torch.int32, device=weight.device),
        longest=max(PROBE),
    )


@torch.no_grad()
def packing_error(language_model: Any, layout: Layout = ROWS) -> float:
    """Relative difference between the logits of packed sequences and those of the same sequences alone.

    Isolation by a mask or by borders is exact for standard attention. Recurrent and hybrid models carry state across
    sequences, and some models do not accept the mask; for these the difference is 1 or more.

    Args:
        language_model: A Hugging Face causal LM.
        layout: How sequences are packed.

    Returns:
        Largest difference divided by the standard deviation of the logits; infinite if the model raises an error.
    """
    rows = probe_rows(language_model.get_input_embeddings().weight)
    ids = rows["targets"]
    alone = [
        language_model(input_ids=part[None], use_cache=False).logits[0]
        for part in torch.tensor_split(ids, list(accumulate(PROBE))[:-1])
    ]
    expected = torch.cat(alone).float()
    try:
        packed = PackedVLM(language_model, layout=layout).logits(rows).float()
    except (RuntimeError, ValueError, TypeError, IndexError):  # The model needs another form of mask.
        return float("inf")
    return float((packed - expected).abs().max() / expected.std().clamp_min(1e-9))


def shortest_window(config: Any) -> int:
    """Smallest attention window of a model's layers, in tokens; 0 if no layer has one.

    The masks of packed rows override these windows, so longer sequences would get wider attention than trained.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = getattr(config, "layer_types", None)
    windows = [getattr(config, "window_size", None)]  # GPT-Neo's local layers.
    if (kinds is None or any("sliding" in kind for kind in kinds)) and getattr(
        config, "use_sliding_window", True
    ) is not False:
        windows.append(getattr(config, "sliding_window", None))
    if kinds is not None and any("chunked" in kind for kind in kinds):  # Llama 4's.
        windows.append(getattr(config, "attention_chunk_size", None))
    return min((window for window in windows if isinstance(window, int) and window > 0), default=0)
