"""Answers to many at once, token by token: whoever comes joins the batch, whoever is done leaves it."""

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
CHUNK = 512  # Tokens of a prompt that are read before the others say their next word.
CONTEXT = 4096  # Longest conversation where nothing else is said, in tokens.


class GenerationRequest:
    """One answer on its way.

    Attributes:
        prompt: What it answers.
        sampling: How it is chosen.
        reason: Why it ended: ``stop`` by itself or at a text to stop at, ``length``, ``cancelled``; empty before.
        reused: Tokens of the prompt that a slot remembered.
        tokens: How many were said, the one that ends it among them.
        error: What broke it off.
        features: Of the images and recordings of the prompt, by kind, (P, width) each; dropped when they are read.
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
        """What was said since it was last asked."""
        return self.words.take()

    @property
    def text(self) -> str:
        """All that was said."""
        return self.words.text


def position_identities(prompt: TokenizedExample) -> list[Hashable]:
    """What each place of a prompt is, so that equal beginnings are found: tokens, and places of images and sounds.

    Images and recordings are told apart by their content, because a file may be overwritten.
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
    """Answers prompts, many at once, and remembers what it read.

    Each prompt gets a slot, the free one that remembers most of its beginning: a second question about the same
    picture does not read the picture again.

    Args:
        model: Who answers.
        slots: Answers at once.
        length: Longest conversation, prompt and answer, in tokens: :data:`CONTEXT` where 0, and no more than the
            language model reads. Memory is taken as conversations grow.
    """

    def __init__(self, model: Multimodal, slots: int = 8, length: int = 0) -> None:
        language = model.language
        limit = int(getattr(language.model.config, "max_position_embeddings", 0) or CONTEXT)
        self.length = min(length or CONTEXT, limit)
        self.model, self.slots = model, slots
        self.reader = Prefill(language.model, slots, self.length, language.tolerance)
        self._held: list[list[Hashable]] = [[] for _ in range(slots)]
        self._used = [0] * slots  # When each slot was last given out, so that the longest unused is overwritten first.
        self._clock = 0
        self._waiting: deque[GenerationRequest] = deque()
        self._reading: dict[int, GenerationRequest] = {}
        self._saying: dict[int, GenerationRequest] = {}

    @property
    def busy(self) -> int:
        """Answers that are waited for or given."""
        return len(self._waiting) + len(self._reading) + len(self._saying)

    def room(self, sampling: SamplingParams) -> int:
        """Tokens that a prompt may have, so that its answer fits; half of all there are at least."""
        return self.length - min(sampling.max_tokens, self.length // 2)

    def submit(self, prompt: TokenizedExample, sampling: SamplingParams) -> GenerationRequest:
        """Let a prompt be answered by the steps that follow.

        Raises:
            ModelError: If it leaves no room for an answer.
        """
        answering = self.answering(prompt, sampling)
        self.enqueue(answering)
        return answering

    def answering(self, prompt: TokenizedExample, sampling: SamplingParams) -> GenerationRequest:
        """An answer that :meth:`enqueue` begins; of all methods the only one that any thread may call.

        The features of its images and recordings are computed here, so that the steps of others do not wait for them.

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
        """Let an answer be given by the steps that follow."""
        self._waiting.append(answering)

    def cancel(self, answering: GenerationRequest) -> None:
        """Break an answer off: its slot is free at once."""
        if answering in self._waiting:
            self._waiting.remove(answering)
        for group in (self._reading, self._saying):
            for slot in [slot for slot, each in group.items() if each is answering]:
                del group[slot]
        answering.reason = answering.reason or "cancelled"

    def stream(self, prompt: TokenizedExample, sampling: SamplingParams) -> Iterator[str]:
        """An answer in pieces, as it is said."""
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
        """Let everybody who has a slot read on, or say one token.

        Who comes to the end of a prompt says its first token, and the others wait with theirs for the next step: a
        first word is given out as soon as it is there, and not after one more pass over the model.
        """
        while self._waiting and (free := self._free()):
            self._seat(self._waiting.popleft(), free)
        begun = False
        for slot, answering in list(self._reading.items()):
            try:
                begun |= self._read(slot, answering)
            except Exception as error:  # Whatever is wrong with this one, the others are answered.
                self._fail(slot, error)
        if not begun:
            self._say()

    def _free(self) -> list[int]:
        return [s for s in range(self.slots) if s not in self._reading and s not in self._saying]

    def _seat(self, answering: GenerationRequest, free: list[int]) -> None:
        common = {slot: _common(self._held[slot], answering.memory) for slot in free}
        for slot in free:  # A slot of another conversation that only begins alike is kept for its own next request.
            if 2 * common[slot] < len(self._held[slot]):
                common[slot] = 0
        slot = max(free, key=lambda s: (common[s], -self._used[s]))
        self._clock += 1
        self._used[slot] = self._clock
        # Its last token is read in any case: what comes after it is asked for.
        count = min(common[slot], len(answering.prompt) - 1)
        answering.reused = answering.read = _before(count, answering.prompt)
        self._held[slot] = answering.memory[: answering.read]
        self._reading[slot] = answering

    def _read(self, slot: int, answering: GenerationRequest) -> bool:
        """Read the next chunk of a prompt; at its end say the first token. Whether it came to its end."""
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
        self._heard(slot, logits[0])
        return True

    def _embeddings(self, answering: GenerationRequest, start: int, end: int) -> Tensor:
        """Of the places from one to another, (1, end - start, W); images and recordings are whole in them."""
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
        """From a number of tokens of whole images or recordings to that of their features."""
        projector = self.model.projector
        return projector.feature_rows if kind == "image" and projector is not None else int

    def _say(self) -> None:
        """Say one more token of every answer; an error ends the answer that it belongs to, and no other."""
        rows = sorted(self._saying)
        if not rows:
            return
        try:
            logits = self._after_last(rows)
        except Exception as error:
            if len(rows) == 1:
                self._fail(rows[0], error)
                return
            # Each alone: positions of the cache that the failed pass has written are written again.
            for slot in rows:
                self._say_one(slot)
            return
        for row, slot in enumerate(rows):
            self._choose(slot, logits[row])

    def _after_last(self, rows: list[int]) -> Tensor:
        """Logits after the last token of some answers, (R, V)."""
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
            self._heard(slot, logits)
        except Exception as error:
            self._fail(slot, error)

    def _fail(self, slot: int, error: Exception) -> None:
        """End the answer of a slot by an error; what the slot holds is not used again."""
        answering = self._reading.get(slot) or self._saying[slot]
        self._held[slot] = []
        answering.error = error
        self.cancel(answering)

    def _heard(self, slot: int, logits: Tensor) -> None:
        """Choose the token after what a slot holds, and end the answer where it ends."""
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
        """Logits after the last of some new tokens, (R, V)."""
        return self.reader.read(rows, starts, embeddings)


def _common(held: list[Hashable], wanted: list[Hashable]) -> int:
    """How many places from the begin on are the same."""
    count = 0
    for one, other in zip(held, wanted, strict=False):
        if one != other:
            break
        count += 1
    return count


def _before(count: int, prompt: TokenizedExample) -> int:
    """At most so many places, and no part of an image or a recording."""
    return min([count, *(s.start for s in prompt.spans if s.start < count < s.start + s.length)])


def _whole(count: int, prompt: TokenizedExample) -> int:
    """At least so many places, and no part of an image or a recording."""
    return max([count, *(s.start + s.length for s in prompt.spans if s.start < count < s.start + s.length)])
