"""Continuous batching: requests join and leave the decoding batch independently."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from mmphi.data.content_hash import content_digest
from mmphi.errors import ModelError
from mmphi.generation.detokenizer import IncrementalDetokenizer
from mmphi.generation.prefill import Prefill
from mmphi.generation.sampling import SamplingParams, TokenSampler
from mmphi.models.multimodal import Multimodal
from mmphi.text.packing import check_feature_lengths, features_by_kind, to_device
from mmphi.text.tokenized_example import TokenizedExample, TranscriptSpan

Reason = Literal["", "stop", "length", "cancelled"]
CHUNK = 512  # Prefill tokens processed between two decode steps.
CONTEXT = 4096  # Default of the longest conversation, in tokens.


class GenerationRequest:
    """A prompt with its answer while it is generated.

    Attributes:
        prompt: Tokenized prompt.
        sampling: Sampling parameters.
        reason: Finish reason: ``stop`` (end token or stop string), ``length`` or ``cancelled``; empty while unfinished.
        reused: Prompt tokens taken from the slot's KV cache.
        tokens: Generated tokens, the end token included.
        error: Exception that ended the request.
        features: Features of the prompt's images and recordings by kind, (P, width) each; dropped after the prefill.
    """

    def __init__(
        self, prompt: TokenizedExample, sampling: SamplingParams, tokenizer: Any, features: dict[str, Tensor]
    ) -> None:
        self.prompt, self.sampling, self.features = prompt, sampling, features
        self.reason: Reason = ""
        self.reused = self.tokens = self.read = 0
        self.error: Exception | None = None
        self.memory = position_identities(prompt)
        self.chooser, self.words = TokenSampler(sampling), IncrementalDetokenizer(tokenizer, sampling.stop)
        self.last = -1

    def take(self) -> str:
        """Return the final text since the last call."""
        return self.words.take()

    @property
    def text(self) -> str:
        """All final text so far."""
        return self.words.text


def position_identities(prompt: TokenizedExample) -> list[Hashable]:
    """Return an identity for each position of a prompt, to find prefixes that a slot has cached.

    A token's identity is its ID. A span position's identity includes the digest of the image or recording, because a
    file may be overwritten.
    """
    memory: list[Hashable] = prompt.input_ids.tolist()
    for span in prompt.spans:
        reference = span.reference.of if isinstance(span.reference, TranscriptSpan) else span.reference
        spelled = span.reference.ids if isinstance(span.reference, TranscriptSpan) else ()
        whole = span.kind, content_digest(reference.source), getattr(reference, "view", 0), spelled
        for place in range(span.length):
            memory[span.start + place] = (whole, place)
    return memory


class Engine:
    """Answers several prompts at once and keeps their KV cache for later requests.

    Each prompt gets the free slot with the longest cached prefix of it: a second question about the same image does
    not prefill the image again.

    Args:
        model: Model that generates.
        slots: Requests decoded at once.
        length: Longest conversation, prompt and answer, in tokens; 0 takes :data:`CONTEXT`. Limited to the language
            model's ``max_position_embeddings``. Cache memory grows with the conversations.
    """

    def __init__(self, model: Multimodal, slots: int = 8, length: int = 0) -> None:
        language = model.language
        limit = int(getattr(language.model.config, "max_position_embeddings", 0) or CONTEXT)
        self.length = min(length or CONTEXT, limit)
        self.model, self.slots = model, slots
        self.reader = Prefill(language.model, slots, self.length, language.tolerance)
        self._held: list[list[Hashable]] = [[] for _ in range(slots)]
        self._used = [0] * slots  # Time of last assignment, for least-recently-used eviction.
        self._clock = 0
        self._waiting: deque[GenerationRequest] = deque()
        self._reading: dict[int, GenerationRequest] = {}
        self._saying: dict[int, GenerationRequest] = {}

    @property
    def busy(self) -> int:
        """Number of unfinished requests."""
        return len(self._waiting) + len(self._reading) + len(self._saying)

    def room(self, sampling: SamplingParams) -> int:
        """Return the longest prompt that leaves room for the answer, in tokens; at least half of ``length``."""
        return self.length - min(sampling.max_tokens, self.length // 2)

    def submit(self, prompt: TokenizedExample, sampling: SamplingParams) -> GenerationRequest:
        """Create and enqueue a request, which the following steps answer.

        Raises:
            ModelError: If the prompt leaves no room for an answer.
        """
        answering = self.answering(prompt, sampling)
        self.enqueue(answering)
        return answering

    def answering(self, prompt: TokenizedExample, sampling: SamplingParams) -> GenerationRequest:
        """Create a request for :meth:`enqueue`; the only method that may be called from any thread.

        Features of images and recordings are computed here, so that they do not delay the steps of other requests.

        Raises:
            ModelError: If the prompt leaves no room for an answer.
        """
        if len(prompt) >= self.length:
            raise ModelError(
                f"the conversation has {len(prompt)} tokens, and this model reads {self.length}, the answer among them",
                "ask less at once",
            )
        check_feature_lengths(prompt, self.model.sources)
        with torch.inference_mode():
            features, _ = features_by_kind(prompt.spans, self.model.sources)
        return GenerationRequest(prompt, sampling, self.model.language.tokenizer, features)

    def enqueue(self, answering: GenerationRequest) -> None:
        """Enqueue a request, which the following steps answer."""
        self._waiting.append(answering)

    def cancel(self, answering: GenerationRequest) -> None:
        """End a request and free its slot at once."""
        if answering in self._waiting:
            self._waiting.remove(answering)
        for group in (self._reading, self._saying):
            for slot in [slot for slot, each in group.items() if each is answering]:
                del group[slot]
        answering.reason = answering.reason or "cancelled"

    def stream(self, prompt: TokenizedExample, sampling: SamplingParams) -> Iterator[str]:
        """Yield an answer in pieces while it is generated."""
        answering = self.submit(prompt, sampling)
        try:
            while not answering.reason:
                self.step()
                if piece := answering.take():
                    yield piece
            if answering.error is not None:
                raise answering.error
        finally:
            self.cancel(answering)

    @torch.inference_mode()
    def step(self) -> None:
        """Prefill one chunk of each unfinished prompt, and decode one token of each answer.

        When a prefill ends, its first token is sampled and decoding waits for the next step, so that the first token is
        emitted without a further forward pass.
        """
        while self._waiting and (free := self._free()):
            self._seat(self._waiting.popleft(), free)
        begun = False
        for slot, answering in list(self._reading.items()):
            try:
                begun |= self._read(slot, answering)
            except Exception as error:  # A failing request must not end the others.
                self._fail(slot, error)
        if not begun:
            self._say()

    def _free(self) -> list[int]:
        return [s for s in range(self.slots) if s not in self._reading and s not in self._saying]

    def _seat(self, answering: GenerationRequest, free: list[int]) -> None:
        common = {slot: _common(self._held[slot], answering.memory) for slot in free}
        for slot in free:  # A slot that shares only a short prefix is kept for the next request of its conversation.
            if 2 * common[slot] < len(self._held[slot]):
                common[slot] = 0
        slot = max(free, key=lambda s: (common[s], -self._used[s]))
        self._clock += 1
        self._used[slot] = self._clock
        # The last prompt token is always processed: its logits give the first token of the answer.
        count = min(common[slot], len(answering.prompt) - 1)
        answering.reused = answering.read = _before(count, answering.prompt)
        self._held[slot] = answering.memory[: answering.read]
        self._reading[slot] = answering

    def _read(self, slot: int, answering: GenerationRequest) -> bool:
        """Prefill the next chunk of a prompt; returns whether it was the last, whose first token is then sampled."""
        start = answering.read
        end = _whole(min(start + CHUNK, len(answering.prompt)), answering.prompt)
        logits = self._forward([slot], [start], self._embeddings(answering, start, end))
        answering.read = end
        self._held[slot] = answering.memory[:end]
        if end < len(answering.prompt):
            return False
        del self._reading[slot]
        answering.features = {}
        self._saying[slot] = answering
        self._sample_next(slot, logits[0])
        return True

    def _embeddings(self, answering: GenerationRequest, start: int, end: int) -> Tensor:
        """Embeddings of positions ``start`` to ``end``, (1, end - start, W); no feature span crosses the borders."""
        prompt, device = answering.prompt, self.model.device
        ids = torch.from_numpy(prompt.input_ids[start:end]).long()[None].to(device)
        features, places = {}, {}
        for kind, rows in answering.features.items():
            own = [span for span in prompt.spans if span.kind == kind]
            rows_of = self._feature_rows(kind)
            before = rows_of(sum(span.length for span in own if span.start < start))
            inside = [torch.arange(s.start, s.start + s.length) - start for s in own if start <= s.start < end]
            places[kind] = torch.cat([*inside, torch.zeros(0, dtype=torch.long)])
            features[kind] = rows[before : before + rows_of(len(places[kind]))]
        embeddings: Tensor = self.model.packed.embed(ids, to_device(features, device), to_device(places, device))
        return embeddings

    def _feature_rows(self, kind: str) -> Callable[[int], int]:
        """Function from a token count of whole images or recordings to their feature count."""
        projector = self.model.projector
        return projector.feature_rows if kind == "image" and projector is not None else int

    def _say(self) -> None:
        """Decode one token of every answer; an error ends only the request that causes it."""
        rows = sorted(self._saying)
        if not rows:
            return
        try:
            logits = self._after_last(rows)
        except Exception as error:
            if len(rows) == 1:
                self._fail(rows[0], error)
                return
            # Retry one at a time; cache positions that the failed pass wrote are overwritten.
            for slot in rows:
                self._say_one(slot)
            return
        for row, slot in enumerate(rows):
            self._choose(slot, logits[row])

    def _after_last(self, rows: list[int]) -> Tensor:
        """Logits after the last token of the answers in slots ``rows``, (R, V)."""
        last = torch.tensor([[self._saying[slot].last] for slot in rows], device=self.model.device)
        embeddings = self.model.language.model.get_input_embeddings()(last)
        return self._forward(rows, [len(self._held[slot]) for slot in rows], embeddings)

    def _say_one(self, slot: int) -> None:
        try:
            logits = self._after_last([slot])
        except Exception as error:
            self._fail(slot, error)
        else:
            self._choose(slot, logits[0])

    def _choose(self, slot: int, logits: Tensor) -> None:
        self._held[slot].append(self._saying[slot].last)
        try:
            self._sample_next(slot, logits)
        except Exception as error:
            self._fail(slot, error)

    def _fail(self, slot: int, error: Exception) -> None:
        """End a slot's request with an error and discard its cache."""
        answering = self._reading.get(slot) or self._saying[slot]
        self._held[slot] = []
        answering.error = error
        self.cancel(answering)

    def _sample_next(self, slot: int, logits: Tensor) -> None:
        """Sample the next token of a slot; finish the request at an end token, a stop string or the length limit."""
        answering = self._saying[slot]
        answering.last = answering.chooser.next(logits)
        answering.tokens += 1
        if answering.last in self.model.language.ends or answering.words.add(answering.last):
            answering.reason = "stop"
        elif answering.tokens >= answering.sampling.max_tokens or len(self._held[slot]) >= self.length:
            answering.reason = "length"
        if answering.reason:
            answering.words.finish()
            del self._saying[slot]

    def _forward(self, rows: list[int], starts: list[int], embeddings: Tensor) -> Tensor:
        """Logits after the last new token of each row, (R, V)."""
        return self.reader.read(rows, starts, embeddings)


def _common(held: list[Hashable], wanted: list[Hashable]) -> int:
    """Length of the common prefix."""
    count = 0
    for one, other in zip(held, wanted, strict=False):
        if one != other:
            break
        count += 1
    return count


def _before(count: int, prompt: TokenizedExample) -> int:
    """``count`` rounded down to a position outside feature spans."""
    return min([count, *(s.start for s in prompt.spans if s.start < count < s.start + s.length)])


def _whole(count: int, prompt: TokenizedExample) -> int:
    """``count`` rounded up to a position outside feature spans."""
    return max([count, *(s.start + s.length for s in prompt.spans if s.start < count < s.start + s.length)])
