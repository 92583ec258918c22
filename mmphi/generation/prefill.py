"""How a language model reads several conversations on: together, one after the other, or each anew from its begin."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mmphi.generation.kv_cache import SlotKVCache

Way = Literal["together", "one by one", "anew"]
# Of each model: its windows are narrowed while it is probed, and others may share it.
_LOCKS: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
LENGTH_DEPENDENT = ("longrope", "dynamic")  # Rotary embeddings whose angles depend on the longest of a batch.
PROBE, WINDOW = (7, 11), 5  # Tokens of the conversations that a way is tried with, and of windows meanwhile.
WINDOWS = ("sliding_window", "attention_chunk_size")  # Settings that say how far back a layer sees.


class Prefill:
    """Reads conversations on, in the fastest way in which this model reads them as it reads each alone.

    - ``together``: in one forward pass, with the keys and values of :class:`~mmphi.generation.kv_cache.SlotKVCache`.
    - ``one by one``: with the same memory, a forward pass for each; for layers that take the last key for the newest.
    - ``anew``: each from its begin at every token, without memory. It is slow, and for recurrent and hybrid models, and
      for conversations longer than those that rotary embeddings of :data:`LENGTH_DEPENDENT` kinds begin to change at.

    Args:
        model: A Hugging Face causal LM.
        slots: Conversations at once.
        length: Tokens that one may have.
        tolerance: Largest difference of logits, over their standard deviation, that counts as none.
    """

    def __init__(self, model: Any, slots: int, length: int, tolerance: float) -> None:
        self.model, self.slots = model, SlotKVCache(slots, length)
        self.way: Way = "anew"
        self._lock = _LOCKS.setdefault(model, threading.RLock())
        ways: tuple[Way, ...] = ("together", "one by one")
        with self._lock:
            for way in ways if length <= unchanged_length(model.config) else ():
                if batched_prefill_error(model, way, length) < tolerance:
                    self.way = way
                    break
        self._read = _ways(model, self.slots)[self.way]

    def read(self, rows: Sequence[int], starts: Sequence[int], embeddings: Tensor) -> Tensor:
        """Read new tokens of some conversations.

        Args:
            rows: Slots of the conversations, rising.
            starts: How many tokens of each were read; what was read behind them is forgotten.
            embeddings: Of the new tokens, (R, tokens, W).

        Returns:
            Logits after the last token of each, (R, V).
        """
        with self._lock:
            return self._read(rows, starts, embeddings)


Read = Callable[[Sequence[int], Sequence[int], Tensor], Tensor]


def _ways(model: Any, slots: SlotKVCache) -> dict[Way, Read]:
    held: dict[int, Tensor] = {}  # Embeddings of each conversation, where it is read anew.

    def together(rows: Sequence[int], starts: Sequence[int], embeddings: Tensor) -> Tensor:
        given = slots.reading(rows, starts, embeddings.shape[1], embeddings.device)
        masks = attention_masks(model.config, given.pop("attention_mask"))
        if model.config._attn_implementation == "eager":
            masks = {kind: _additive(mask, embeddings.dtype) for kind, mask in masks.items()}
        mask = next(iter(masks.values())) if len(masks) == 1 else masks
        return _last(model(inputs_embeds=embeddings, attention_mask=mask, use_cache=True, logits_to_keep=1, **given))

    def one_by_one(rows: Sequence[int], starts: Sequence[int], embeddings: Tensor) -> Tensor:
        each = zip(rows, starts, embeddings.unsqueeze(1), strict=True)
        return torch.cat([together([row], [start], own) for row, start, own in each])

    def anew(rows: Sequence[int], starts: Sequence[int], embeddings: Tensor) -> Tensor:
        found = []
        for row, start, own in zip(rows, starts, embeddings.unsqueeze(1), strict=True):
            held[row] = torch.cat([held[row][:, :start], own], dim=1) if start else own
            found.append(_last(model(inputs_embeds=held[row], use_cache=False)))
        return torch.cat(found)

    return {"together": together, "one by one": one_by_one, "anew": anew}


def _last(output: Any) -> Tensor:
    logits: Tensor = output.logits[:, -1]
    return logits


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What eager attention adds to its scores."""
    empty = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return empty.masked_fill(~mask, torch.finfo(dtype).min)


def unchanged_length(config: Any) -> float:
    """Tokens up to which the angles of a model's rotary embeddings do not depend on how long a conversation is."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    each = [
        found,
        *(value for value in found.values() if isinstance(value, dict)),
    ]  # Some have one for each layer type.
    for rope in each:
        if rope.get("rope_type", rope.get("type")) in LENGTH_DEPENDENT:
            names = "original_max_position_embeddings", "max_position_embeddings"
            own = rope.get(names[0]) or getattr(config, names[0], None) or getattr(config, names[1], None)
            return float(own or inf)
    return inf


def attention_masks(config: Any, seen: Tensor) -> dict[str, Tensor]:
    """Who sees whom in each kind of a model's layers.

    Args:
        config: Of the model.
        seen: Which places each token sees where it sees all before it, bool (R, 1, tokens, places).

    Returns:
        By the kind of layer as transformers calls it, a mask of the shape of ``seen``.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if not kinds:
        kinds = {"sliding_attention" if window else "full_attention"}
    chunk = getattr(config, "attention_chunk_size", None)
    place = torch.arange(seen.shape[-1], device=seen.device)
    own = seen.sum(dim=-1, keepdim=True) - 1  # The place of each token itself.
    masks = {}
    for kind in sorted(kinds):
        mask = seen
        if kind == "sliding_attention" and window and getattr(config, "use_sliding_window", True) is not False:
            mask = mask & (place > own - window)
        if kind == "chunked_attention" and chunk:
            mask = mask & (place // chunk == own // chunk)
        masks[kind] = mask
    return masks


@torch.inference_mode()
def batched_prefill_error(model: Any, way: Way, length: int) -> float:
    """How far logits of two conversations that are read on in one way are from those of each alone, whole.

    Windows that are narrower than a conversation may be are tried as well: narrowed to :data:`WINDOW` tokens meanwhile,
    where the model looks at its configuration for them, else with conversations that are longer than they are.

    Args:
        model: A Hugging Face causal LM.
        way: How they are read.
        length: Tokens that a conversation may have.

    Returns:
        The largest difference over the standard deviation of the logits; infinite where the model cannot be asked so.
    """
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    fixed = getattr(text, "window_size", None)  # GPT-Neo's, which its layers have built in.
    longer = int(fixed) if isinstance(fixed, int) and fixed < length else 0
    embed = model.get_input_embeddings()
    ids = torch.arange(longer + max(PROBE) + 1, device=embed.weight.device) * 37 % max(2, embed.num_embeddings - 1)
    lengths, worst = [longer + each for each in PROBE], 0.0
    with _narrow(text, length):
        try:
            alone = [model(input_ids=ids[None, : each + 1], use_cache=False).logits[0] for each in lengths]
            slots = SlotKVCache(len(lengths), longer + max(PROBE) + 1)
            read = _ways(model, slots)[way]
            for row, each in enumerate(lengths):
                first = each // 2
                read([row], [0], embed(ids[None, :first]))
                found = [read([row], [first], embed(ids[None, first:each]))]
                expected = [alone[row][each - 1]]
                if row == len(lengths) - 1:  # And both by their next token, at once.
                    both = read([0, 1], lengths, embed(torch.stack([ids[each : each + 1] for each in lengths])))
                    found += [both]
                    expected += [alone[0][-1], alone[1][-1]]
                error = _difference(torch.cat(found), torch.stack(expected))
                worst = max(worst, error)
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
            return inf  # It has no such memory, or wants masks of another form.
    return worst


def _difference(found: Tensor, expected: Tensor) -> float:
    error = (found.float() - expected.float()).abs().max() / expected.float().std().clamp_min(1e-9)
    return float(error) if torch.isfinite(error) else inf


@contextmanager
def _narrow(config: Any, length: int) -> Iterator[None]:
    """Narrow the windows of a model for a moment, where they are narrower than its conversations."""
    wide = {name: value for name in WINDOWS if isinstance(value := getattr(config, name, None), int) and value < length}
    try:
        for name in wide:
            setattr(config, name, WINDOW)
        yield
    finally:
        for name, value in wide.items():
            setattr(config, name, value)
