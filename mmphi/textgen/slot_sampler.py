"""Sampling in fixed cache slots, one token of every text per forward pass, for CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mmphi.textgen.backends import Generation, SamplingConfig, SamplingRequest


class SlotSampler:
    """Samples one token of every text per forward pass, in fixed cache slots; for CPUs.

    transformers' continuous batching puts all texts in one row under a mask, which multiplies the cost of attention by
    the number of texts.
    """

    def __init__(self, model: Any, draw: SamplingConfig, batch: int, longest: int) -> None:
        self.model, self.draw, self.batch, self.longest = model, draw, batch, longest

    def __call__(self, wanted: Iterator[SamplingRequest]) -> Iterator[Generation]:
        """See :class:`Sampler`."""
        from mmphi.models.patches.module_patches import patched

        with patched(self.model, "decoding"):
            yield from self._written(wanted)

    def _written(self, wanted: Iterator[SamplingRequest]) -> Iterator[Generation]:
        from mmphi.generation.kv_cache import SlotKVCache

        slots = SlotKVCache(self.batch, self.longest)
        open_: dict[int, _Open] = {}
        more = True
        while True:
            done: list[_Open] = []
            with torch.inference_mode():  # Not around ``yield``, where the mode would apply to the caller.
                while more and len(open_) < self.batch:
                    one = next(wanted, None)
                    if one is None:
                        more = False
                    else:
                        free = next(slot for slot in range(self.batch) if slot not in open_)
                        open_[free] = _Open(one)
                        self._read(slots, free, one.ids[:-1])
                if not open_:
                    return
                for slot, token, logprob in self._step(slots, open_):
                    if open_[slot].append(token, logprob):
                        done.append(open_.pop(slot))
            for each in done:
                yield Generation(each.wanted.id, tuple(each.ids), each.logprob)

    def _step(self, slots: Any, open_: dict[int, _Open]) -> Iterator[tuple[int, int, float]]:
        """Sample a token of every text; yields slot, token ID and log-probability."""
        rows = sorted(open_)
        last = torch.tensor([[open_[slot].next] for slot in rows], device=self.model.device)
        logits = self._pass(slots, rows, [open_[slot].read for slot in rows], last)
        tokens, logprobs = sample_tokens(self._narrowed(logits))
        return zip(rows, tokens.tolist(), logprobs.tolist(), strict=True)

    def _read(self, slots: Any, slot: int, ids: tuple[int, ...]) -> None:
        """Prefill a slot with a prompt without its last token."""
        if ids:
            self._pass(slots, [slot], [0], torch.tensor([ids], device=self.model.device))

    def _pass(self, slots: Any, rows: list[int], read: list[int], ids: torch.Tensor) -> torch.Tensor:
        """Logits (R, V) after the last of tokens (R, n), which are appended to slots ``rows`` at positions ``read``."""
        given = slots.reading(rows, read, ids.shape[1], self.model.device)
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **given).logits
        return logits[:, -1].float()

    def _narrowed(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (R, V) after temperature, top-k and top-p."""
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        none: Any = None  # None of them uses the input IDs.
        if self.draw.temperature != 1.0:
            logits = TemperatureLogitsWarper(self.draw.temperature)(none, logits)
        if self.draw.top_k:
            logits = TopKLogitsWarper(self.draw.top_k)(none, logits)
        if self.draw.top_p < 1.0:
            logits = TopPLogitsWarper(self.draw.top_p)(none, logits)
        return logits


def sample_tokens(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample a token ID per row (R,) from logits (R, V); returns it with its log-probability (R,).

    Inverse transform sampling needs one uniform number per row. ``torch.multinomial`` draws one per entry of the
    vocabulary, which on a CPU costs more than the softmax. Probabilities are cumulated in double precision: in single,
    rare tokens among 50,000 would be lost to rounding.
    """
    odds = torch.log_softmax(logits, dim=-1)
    sums = odds.double().exp_().cumsum_(dim=-1)
    places = torch.rand(len(odds), 1, dtype=torch.float64, device=odds.device) * sums[:, -1:]
    tokens = torch.searchsorted(sums, places, right=True).clamp_(max=odds.shape[-1] - 1)
    return tokens[:, 0], odds.gather(1, tokens)[:, 0]


@dataclass
class _Open:
    """A text being generated, of which ``read`` tokens, prompt and own, are in the cache."""

    wanted: SamplingRequest
    logprob: float = 0.0

    def __post_init__(self) -> None:
        self.ids: list[int] = []
        self.read = len(self.wanted.ids) - 1  # The last one is decoded together with the other texts.

    @property
    def next(self) -> int:
        """Next input token."""
        return self.ids[-1] if self.ids else self.wanted.ids[-1]

    def append(self, token: int, logprob: float) -> bool:
        """Append a sampled token; returns whether it completes the text."""
        self.read += 1
        self.ids.append(token)
        self.logprob += logprob
        return token in self.wanted.ends or len(self.ids) >= self.wanted.longest
