"""KV cache of several conversations, each at its own position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

SMALLEST = 256  # Initial capacity of a slot, in tokens.


class SlotKVCache(Cache):
    """Keys and values of several conversations.

    Each conversation has a slot, one row of every layer's cache, and grows independently. All slots have the same
    capacity, which doubles when a conversation outgrows it. Before each forward pass, :meth:`reading` sets the slots of
    the batch and the position at which each continues.

    Args:
        slots: Number of conversations.
        length: Longest conversation, in tokens.

    Attributes:
        capacity: Tokens per slot that memory is allocated for.
    """

    def __init__(self, slots: int, length: int) -> None:
        # No state of transformers' Cache is used, only its interface in a model's forward pass.
        self.layers: list[Any] = []
        self.slots, self.length = slots, length
        self.capacity = min(SMALLEST, length)
        self._memory: list[tuple[Tensor, Tensor]] = []
        self._rows: Tensor | slice = slice(0)
        self._index = self._places = torch.zeros(0, dtype=torch.long)
        self._seen = 0

    def reading(self, rows: Sequence[int], starts: Sequence[int], tokens: int, device: torch.device) -> dict[str, Any]:
        """Prepare for a forward pass, and return its arguments other than the embeddings.

        Args:
            rows: Slots of the batch, ascending.
            starts: Cached tokens of each slot to attend to; later positions are overwritten.
            tokens: New tokens per slot.
            device: Device of the model.

        Returns:
            ``attention_mask`` bool (R, 1, tokens, seen), ``position_ids`` (R, tokens) and ``past_key_values``.

        Raises:
            ValueError: If a conversation would exceed ``length``.
        """
        self._seen = max(starts) + tokens
        if self._seen > self.length:
            raise ValueError(f"{self._seen} tokens do not fit in a slot of {self.length}")
        self._grow()
        self._index = torch.tensor(list(rows), device=device)
        contiguous = list(rows) == list(range(rows[0], rows[0] + len(rows)))
        self._rows = slice(rows[0], rows[0] + len(rows)) if contiguous else self._index  # A slice avoids a copy.
        self._places = torch.tensor(list(starts), device=device)[:, None] + torch.arange(tokens, device=device)
        mask = torch.arange(self._seen, device=device) <= self._places[:, :, None]
        return {"attention_mask": mask[:, None], "position_ids": self._places, "past_key_values": self}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values, (R, heads, tokens, D), and return all of the batch, (R, heads, seen, D)."""
        while len(self._memory) <= layer_idx:
            self._memory.append((self._empty(key_states, self.capacity), self._empty(value_states, self.capacity)))
        keys, values = self._memory[layer_idx]
        keys[self._index[:, None], :, self._places] = key_states.transpose(1, 2)
        values[self._index[:, None], :, self._places] = value_states.transpose(1, 2)
        return keys[self._rows, :, : self._seen], values[self._rows, :, : self._seen]

    def _grow(self) -> None:
        """Grow the capacity to the positions of the batch; cached entries are kept."""
        if self._seen <= self.capacity:
            return
        capacity = self.capacity
        while capacity < self._seen:
            capacity = min(2 * capacity, self.length)
        # All layers or none: an out-of-memory error in between leaves the cache unchanged.
        larger = [(self._grown(keys, capacity), self._grown(values, capacity)) for keys, values in self._memory]
        self._memory, self.capacity = larger, capacity

    def _grown(self, memory: Tensor, capacity: int) -> Tensor:
        grown = self._empty(memory, capacity)
        grown[:, :, : memory.shape[2]] = memory
        return grown

    def _empty(self, states: Tensor, capacity: int) -> Tensor:
        # Zeros, because masked values are multiplied by zero, which gives NaN for uninitialised non-finite values.
        return states.new_zeros(self.slots, states.shape[1], capacity, states.shape[3])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0; models are given ``position_ids``, so that they do not depend on it."""
        return 0
