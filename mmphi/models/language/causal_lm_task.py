"""What pretraining runs: rows of documents in, the summed loss of every next token out."""

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
    """A Phi whose every position is learned, the head and the loss computed together.

    Args:
        model: A ``PhiForCausalLM``; whatever has a plain linear head over ``model.model``.
        walls: How documents of one row are kept separate: by attention inside each, for which the model must be
            :func:`~mmphi.models.patches.varlen_attention.varlen_attention_applied`, or by a mask over the row.
        compiled: Whether torch compiles the layers.
    """

    def __init__(self, model: Any, *, walls: Walls = "documents", compiled: bool = False) -> None:
        super().__init__()
        self.model, self.walls = model, walls
        self._compiled: Any = torch.compile(model.model, dynamic=False) if compiled else None

    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the head is given, (rows * tokens, width)."""
        ids, positions = batch["input_ids"], batch["position_ids"]
        # Validation has rows of other lengths, which would be compiled one by one.
        body: Any = self._compiled if self._compiled is not None and self.training else self.model.model
        if self.walls == "mask":
            mask = block_causal_mask(batch["segments"])
            output = body(ids, position_ids=positions, attention_mask=mask, use_cache=False)
        else:
            if self.model.config._attn_implementation != NAME:
                raise RuntimeError("the model must be inside varlen_attention_applied")
            output = body(
                ids.reshape(1, -1),
                position_ids=positions.reshape(1, -1),
                use_cache=False,
                # Four dimensions: taken as it is, so that no mask over the whole row is built.
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


PROBE = (5, 9, 2)  # Lengths of the documents that walls are tried with.


@torch.no_grad()
def isolation_error(task: CausalTask) -> float:
    """How far the loss of documents in one row is from that of the same alone; infinite where it cannot be computed."""
    device = next(task.parameters()).device
    ids = torch.arange(sum(PROBE) + 1, device=device) * 37 % task.model.config.vocab_size
    batches, start = [], 0
    for length in PROBE:
        batches.append(probe(ids[start : start + length + 1], [length]))
        start += length
    try:
        alone = sum(float(task(**batch)) for batch in batches)
        together = float(task(**probe(ids, list(PROBE))))
    except (RuntimeError, ValueError, TypeError, ImportError, NotImplementedError):
        return float("inf")
    return abs(together - alone) / sum(PROBE)


def probe(ids: Tensor, lengths: list[int]) -> dict[str, Tensor]:
    """One row of documents of these lengths; ids are one more than they."""
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
    """Run a task forward and backward once, and forget the gradients; raises whatever goes wrong."""
    device = next(task.parameters()).device
    ids = torch.arange(context + 1, device=device) % task.model.config.vocab_size
    task.train()
    task(**probe(ids, [context])).backward()
    task.zero_grad()
