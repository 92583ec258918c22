"""Conversations as token sequences with supervised tokens and feature spans."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mmphi.text.pieces import PromptPart
from mmphi.text.prompt import AUDIO_MARK, MARK, Prompt, places


class FeatureSpan(NamedTuple):
    """A range of positions that features fill in place of tokens.

    Attributes:
        kind: ``image`` or ``audio``.
        reference: Image or recording, as its feature source identifies it; :class:`TranscriptSpan` for a transcript.
        start: Position of the first feature.
        length: Number of features.
    """

    kind: str
    reference: Any
    start: int
    length: int


class SpanContent(NamedTuple):
    """An input that fills a span.

    Attributes:
        kind: ``image`` or ``audio``.
        reference: The image or recording.
        length: Number of its features.
        transcript: Transcript of a recording, if its words fill the span, one feature per token; otherwise ``None``.
    """

    kind: str
    reference: Any
    length: int
    transcript: str | None = None


class TranscriptSpan(NamedTuple):
    """A recording and the tokens of its transcript in the prompt.

    Attributes:
        of: The recording.
        ids: Token ids, equal to those of the same words typed in its place.
    """

    of: Any
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One tokenized sequence, ready for packing.

    Attributes:
        input_ids: Token ids, int32, shape (length,); positions of spans hold 0.
        supervised: Which tokens are training targets, bool, shape (length,).
        spans: Feature spans, in order.
        name: Name of the example, for error messages.
    """

    input_ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    spans: tuple[FeatureSpan, ...] = ()
    name: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)


def join_spans(parts: Iterable[PromptPart], inputs: Sequence[SpanContent] = (), name: str = "") -> TokenizedExample:
    """Concatenate the parts of a prompt; each input fills the next span of its kind.

    The first token is never supervised, because no position precedes it to predict it from.
    """
    spans: list[FeatureSpan] = []
    filled: list[tuple[PromptPart, int, int]] = []  # Part, start and length.
    waiting, total = list(inputs), 0
    for part in parts:
        length = len(part.ids)
        if part.span:
            (chosen,) = [i for i in waiting if i.kind == part.span][:1]
            waiting.remove(chosen)
            reference, length = chosen.reference, chosen.length
            if part.spelled:
                reference, length = TranscriptSpan(reference, part.ids), len(part.ids)
            spans.append(FeatureSpan(chosen.kind, reference, total, length))
        filled.append((part, total, length))
        total += length
    ids, supervised = np.zeros(total, np.int32), np.zeros(total, np.bool_)
    for part, start, length in filled:
        if part.ids:
            ids[start : start + length] = part.ids
        if part.supervised:
            supervised[start : start + length] = True
    supervised[:1] = False
    return TokenizedExample(ids, supervised, tuple(spans), name)


def tokenize_conversation(
    turns: Sequence[tuple[str, str | None]],
    inputs: Sequence[SpanContent],
    prompt: Prompt,
    max_length: int,
    name: str = "",
    context: str = "",
) -> TokenizedExample | None:
    """Tokenize a conversation into a sequence of at most ``max_length`` tokens.

    If it is too long, the oldest turns are dropped with the images and recordings placed in them, and answers are never
    cut (LLaVA truncates after expanding the image, which cuts answers).

    Args:
        turns: Questions and answers.
        inputs: Images and recordings of the conversation, each kind in order.
        prompt: Prompt that formats the conversation.
        max_length: Longest sequence, in tokens, features included.
        name: Name of the example, for error messages.
        context: Text in place of images.

    Returns:
        The sequence; ``None`` if the last turn alone is too long, or no token is supervised.
    """
    images, audio = ([i for i in inputs if i.kind == kind] for kind in ("image", "audio"))
    questions = [question for question, _ in turns]
    images_placed, audio_placed = places(questions, len(images)), places(questions, len(audio), AUDIO_MARK)
    while turns:
        transcripts = [each.transcript for each in audio]
        parts = prompt.parts(turns, images=len(images), context=context, audio=transcripts)
        sample = join_spans(parts, [*images, *audio], name)
        if len(sample) <= max_length:
            return sample if sample.supervised.any() else None
        if images_placed:
            images = images[turns[0][0].count(MARK) :]
        if audio_placed:
            audio = audio[turns[0][0].count(AUDIO_MARK) :]
        turns = turns[1:]
    return None
