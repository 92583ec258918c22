"""Keys and values of several conversations side by side, each at its own place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

SMALLEST = 256  # Tokens of a slot at first.


class SlotKVCache(Cache):
    """Keys and values of several conversations.

    Each conversation has a slot, a row of every layer's memory, and grows in it on its own. All rows have the same
    capacity, which doubles when a conversation outgrows it. Before a forward pass :meth:`reading` says which slots the
    batch is of and where each goes on.

    Args:
        slots: Conversations at once.
        length: Tokens that one may have at most.

    Attributes:
        capacity: Tokens that each has memory for at present.
    """

    def __init__(self, slots: int, length: int) -> None:
        # Nothing of transformers' own is kept: only its place in a model's forward pass is taken.
        self.layers: list[Any] = []
        self.slots, self.length = slots, length
        self.capacity = min(SMALLEST, length)
        self._memory: list[tuple[Tensor, Tensor]] = []
        self._rows: Tensor | slice = slice(0)
        self._index = self._places = torch.zeros(0, dtype=torch.long)
        self._seen = 0

    def reading(self, rows: Sequence[int], starts: Sequence[int], tokens: int, device: torch.device) -> dict[str, Any]:
        """Prepare for a forward pass, and give what it needs beside its embeddings.

        Args:
            rows: Slots of the batch, rising.
            starts: How many tokens of each shall be seen; what lies behind them is overwritten.
            tokens: New tokens of each.
            device: Of the model.

        Returns:
            ``attention_mask`` bool (R, 1, tokens, seen), ``position_ids`` (R, tokens) and ``past_key_values``.

        Raises:
            ValueError: If one of them would outgrow its slot.
        """
        self._seen = max(starts) + tokens
        if self._seen > self.length:
            raise ValueError(f"{self._seen} tokens do not fit in a slot of {self.length}")
        self._grow()
        self._index = torch.tensor(list(rows), device=device)
        together = list(rows) == list(range(rows[0], rows[0] + len(rows)))
        self._rows = slice(rows[0], rows[0] + len(rows)) if together else self._index  # A slice is read in place.
        self._places = torch.tensor(list(starts), device=device)[:, None] + torch.arange(tokens, device=device)
        mask = torch.arange(self._seen, device=device) <= self._places[:, :, None]
        return {"attention_mask": mask[:, None], "position_ids": self._places, "past_key_values": self}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep new keys and values, (R, heads, tokens, D), and give all that the batch sees, (R, heads, seen, D)."""
        while len(self._memory) <= layer_idx:
            self._memory.append((self._empty(key_states, self.capacity), self._empty(value_states, self.capacity)))
        keys, values = self._memory[layer_idx]
        keys[self._index[:, None], :, self._places] = key_states.transpose(1, 2)
        values[self._index[:, None], :, self._places] = value_states.transpose(1, 2)
        return keys[self._rows, :, : self._seen], values[self._rows, :, : self._seen]

    def _grow(self) -> None:
        """Make room for what the batch sees; what the slots hold is kept."""
        if self._seen <= self.capacity:
            return
        capacity = self.capacity
        while capacity < self._seen:
            capacity = min(2 * capacity, self.length)
        # All layers or none: where memory ends in between, the slots stay as they are.
        larger = [(self._grown(keys, capacity), self._grown(values, capacity)) for keys, values in self._memory]
        self._memory, self.capacity = larger, capacity

    def _grown(self, memory: Tensor, capacity: int) -> Tensor:
        grown = self._empty(memory, capacity)
        grown[:, :, : memory.shape[2]] = memory
        return grown

    def _empty(self, states: Tensor, capacity: int) -> Tensor:
        # Zeros, because what is masked is still multiplied by zero: anything else there might not be finite.
        return states.new_zeros(self.slots, states.shape[1], capacity, states.shape[3])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen before this pass: positions are given, so that nothing hangs on it."""
        return 0
