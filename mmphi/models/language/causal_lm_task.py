"""Pretraining task: rows of documents in, summed loss of every next token out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmphi.models.language.linear_cross_entropy import linear_cross_entropy
from mmphi.models.packed_vlm import block_causal_mask
from mmphi.models.patches.varlen_attention import NAME

Walls = Literal["documents", "mask"]


class CausalTask(nn.Module):
    """Phi model with a loss at every position; head and loss are computed together.

    Args:
        model: A ``PhiForCausalLM``, or any model with a plain linear head over ``model.model``.
        walls: How documents of one row are isolated: by attention within each document, which requires
            :func:`patched(model, "training") <mmphi.models.patches.module_patches.patched>`, or by a mask over the row.
        compiled: Whether torch compiles the model's body for training.
    """

    def __init__(self, model: Any, *, walls: Walls = "documents", compiled: bool = False) -> None:
        super().__init__()
        self.model, self.walls = model, walls
        self._compiled: Any = torch.compile(model.model, dynamic=False) if compiled else None

    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Inputs of the output head, (rows * tokens, width)."""
        ids, positions = batch["input_ids"], batch["position_ids"]
        # Rows of validation have other lengths, each of which would be compiled separately.
        body: Any = self._compiled if self._compiled is not None and self.training else self.model.model
        if self.walls == "mask":
            mask = block_causal_mask(batch["segments"])
            output = body(ids, position_ids=positions, attention_mask=mask, use_cache=False)
        else:
            if self.model.config._attn_implementation != NAME:
                raise RuntimeError("the model must be patched for training")
            output = body(
                ids.reshape(1, -1),
                position_ids=positions.reshape(1, -1),
                use_cache=False,
                # transformers does not expand a four-dimensional mask, so no mask over the whole row is built.
                attention_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
                borders=batch["borders"],
                longest=ids.shape[1],
            )
        hidden: Tensor = output.last_hidden_state
        return hidden.flatten(0, 1)

    def forward(self, **batch: Any) -> Tensor:
        """Summed loss of a batch of :class:`~mmphi.training.lm_dataset.LMDataset`, in nats, shape ()."""
        head = self.model.get_output_embeddings()
        return linear_cross_entropy(self.hidden(batch), head.weight, head.bias, batch["targets"].flatten())


PROBE = (5, 9, 2)  # Lengths of the documents that isolation is tested with.


@torch.no_grad()
def isolation_error(task: CausalTask) -> float:
    """Loss difference, in nats per token, between documents in one row and each alone; infinite if either fails."""
    device = next(task.parameters()).device
    ids = torch.arange(sum(PROBE) + 1, device=device) * 37 % task.model.config.vocab_size
    batches, start = [], 0
    for length in PROBE:
        batches.append(probe(ids[start : start + length + 1], [length]))
        start += length
    try:
        alone = sum(float(task(**batch)) for batch in batches)
        packed = float(task(**probe(ids, list(PROBE))))
    except (RuntimeError, ValueError, TypeError, ImportError, NotImplementedError):
        return float("inf")
    return abs(packed - alone) / sum(PROBE)


def probe(ids: Tensor, lengths: list[int]) -> dict[str, Tensor]:
    """One row of documents of these lengths, from one token more than their sum."""
    device = ids.device
    spans = torch.tensor(lengths, device=device)
    return {
        "input_ids": ids[None, :-1],
        "targets": ids[None, 1:],
        "position_ids": torch.cat([torch.arange(n, device=device) for n in lengths])[None],
        "segments": torch.repeat_interleave(torch.arange(len(lengths), device=device), spans)[None],
        "borders": torch.cat([spans.new_zeros(1), spans.cumsum(0)]).int(),
    }


def smoke_test(task: CausalTask, context: int) -> None:
    """Run one forward and backward pass and discard the gradients; passes on any exception."""
    device = next(task.parameters()).device
    ids = torch.arange(context + 1, device=device) % task.model.config.vocab_size
    task.train()
    task(**probe(ids, [context])).backward()
    task.zero_grad()
