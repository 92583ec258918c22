"""Forward passes over several conversations: batched, one at a time, or recomputed without a cache."""

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
# One lock per model: probing narrows its attention windows, and several engines may share the model.
_LOCKS: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
LENGTH_DEPENDENT = ("longrope", "dynamic")  # Rotary embeddings whose angles depend on a batch's longest sequence.
PROBE, WINDOW = (7, 11), 5  # Lengths of the probe conversations, and attention window during the probe, in tokens.
WINDOWS = ("sliding_window", "attention_chunk_size")  # Config fields that limit a layer's attention.


class Prefill:
    """Computes logits of several conversations by the fastest method whose logits equal those of each one alone.

    - ``together``: one forward pass with :class:`~mmphi.generation.kv_cache.SlotKVCache`.
    - ``one by one``: one forward pass per conversation with the same cache, for layers that assume that the last key is
      the newest.
    - ``anew``: the whole conversation is recomputed for every token, without a cache. This is slow. Recurrent and
      hybrid models need it, and conversations beyond the length at which rotary embeddings of
      :data:`LENGTH_DEPENDENT` types change their angles.

    Args:
        model: A Hugging Face causal LM.
        slots: Number of conversations.
        length: Longest conversation, in tokens.
        tolerance: Largest accepted difference of logits, in their standard deviations.
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
        """Process new tokens of some conversations.

        Args:
            rows: Slots of the conversations, ascending.
            starts: Position of each conversation's first new token; cached entries from there on are discarded.
            embeddings: Embeddings of the new tokens, (R, tokens, W).

        Returns:
            Logits after the last token of each conversation, (R, V).
        """
        with self._lock:
            return self._read(rows, starts, embeddings)


Read = Callable[[Sequence[int], Sequence[int], Tensor], Tensor]


def _ways(model: Any, slots: SlotKVCache) -> dict[Way, Read]:
    held: dict[int, Tensor] = {}  # Embeddings of each conversation, for recomputation.

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
    """Boolean mask as the additive mask of eager attention."""
    empty = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return empty.masked_fill(~mask, torch.finfo(dtype).min)


def unchanged_length(config: Any) -> float:
    """Return the sequence length up to which rotary angles do not depend on the length, in tokens; often infinite."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    each = [
        found,
        *(value for value in found.values() if isinstance(value, dict)),
    ]  # Some configs have one per layer type.
    for rope in each:
        if rope.get("rope_type", rope.get("type")) in LENGTH_DEPENDENT:
            names = "original_max_position_embeddings", "max_position_embeddings"
            own = rope.get(names[0]) or getattr(config, names[0], None) or getattr(config, names[1], None)
            return float(own or inf)
    return inf


def attention_masks(config: Any, seen: Tensor) -> dict[str, Tensor]:
    """Return the attention mask of each layer type of a model.

    Args:
        config: Config of the model.
        seen: Causal mask, bool (R, 1, tokens, positions).

    Returns:
        Masks of the shape of ``seen``, by the layer type of transformers (such as ``sliding_attention``).
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if not kinds:
        kinds = {"sliding_attention" if window else "full_attention"}
    chunk = getattr(config, "attention_chunk_size", None)
    place = torch.arange(seen.shape[-1], device=seen.device)
    own = seen.sum(dim=-1, keepdim=True) - 1  # Position of each token itself.
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
    """Return the error of a method's logits on two probe conversations, against full forward passes of each alone.

    The probe covers attention windows that are narrower than ``length``. Windows that the model takes from its config
    are narrowed to :data:`WINDOW` tokens during the probe; for fixed windows the probe conversations are longer than
    the window.

    Args:
        model: A Hugging Face causal LM.
        way: Method to check.
        length: Longest conversation, in tokens.

    Returns:
        The largest difference divided by the standard deviation of the logits; infinite if the model does not support
        the method.
    """
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    fixed = getattr(text, "window_size", None)  # GPT-Neo's, fixed when its layers are constructed.
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
                if row == len(lengths) - 1:  # Then the next token of both in one call.
                    both = read([0, 1], lengths, embed(torch.stack([ids[each : each + 1] for each in lengths])))
                    found += [both]
                    expected += [alone[0][-1], alone[1][-1]]
                error = _difference(torch.cat(found), torch.stack(expected))
                worst = max(worst, error)
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
            return inf  # The model does not accept this cache or this form of mask.
    return worst


def _difference(found: Tensor, expected: Tensor) -> float:
    error = (found.float() - expected.float()).abs().max() / expected.float().std().clamp_min(1e-9)
    return float(error) if torch.isfinite(error) else inf


@contextmanager
def _narrow(config: Any, length: int) -> Iterator[None]:
    """Set attention windows that are shorter than ``length`` to :data:`WINDOW` inside the context."""
    wide = {name: value for name in WINDOWS if isinstance(value := getattr(config, name, None), int) and value < length}
    try:
        for name in wide:
            setattr(config, name, WINDOW)
        yield
    finally:
        for name, value in wide.items():
            setattr(config, name, value)
