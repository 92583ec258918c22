"""Conversations as token sequences: what is given, what is learned, and the spans where features stand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mmphi.text.pieces import PromptPart
from mmphi.text.prompt import AUDIO_MARK, MARK, Prompt, places


class FeatureSpan(NamedTuple):
    """A stretch of a sequence where features stand in place of tokens.

    Attributes:
        kind: ``image`` or ``audio``.
        reference: What the features are of, as their source knows it; :class:`TranscriptSpan` where words are heard.
        start: Position of the first.
        length: How many they are.
    """

    kind: str
    reference: Any
    start: int
    length: int


class SpanContent(NamedTuple):
    """What a span shall stand for.

    Attributes:
        kind: ``image`` or ``audio``.
        reference: The image or recording.
        length: How many features it has.
        said: What is said in a recording, where its features are those words: the span is as long as they are tokens.
    """

    kind: str
    reference: Any
    length: int
    said: str | None = None


class TranscriptSpan(NamedTuple):
    """A recording and the tokens that its words are, where they stand in the prompt.

    Attributes:
        of: The recording.
        ids: Token ids, as the words typed in its place would have.
    """

    of: Any
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One sequence, ready to be packed.

    Attributes:
        input_ids: Token ids, int32, shape (length,); positions of spans hold 0.
        supervised: Which tokens are to be predicted, bool, shape (length,).
        spans: Where features stand, in order.
        name: Where the sequence came from, for messages.
    """

    input_ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    spans: tuple[FeatureSpan, ...] = ()
    name: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)


def join_spans(parts: Iterable[PromptPart], inputs: Sequence[SpanContent] = (), name: str = "") -> TokenizedExample:
    """Lay the parts of a prompt end to end, each input in the next span of its kind.

    The first token is never supervised: nothing stands before it to predict it from.
    """
    spans: list[FeatureSpan] = []
    filled: list[tuple[PromptPart, int, int]] = []  # A part, where it begins, and its length.
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
    """A conversation as a sequence of at most ``max_length`` tokens.

    Where it is too long, the oldest turns go first, with the images and recordings that they place, and the answer
    stays whole (LLaVA truncates after expanding the image, and so eats answers).

    Args:
        turns: Questions and answers.
        inputs: The images and the recordings that it is about, each in their order.
        prompt: Writes it.
        max_length: In tokens, features included.
        name: Where it came from, for messages.
        context: Text that stands where images would.

    Returns:
        ``None`` where even the last turn alone is too long, or no token of it is supervised.
    """
    images, audio = ([i for i in inputs if i.kind == kind] for kind in ("image", "audio"))
    questions = [question for question, _ in turns]
    images_placed, audio_placed = places(questions, len(images)), places(questions, len(audio), AUDIO_MARK)
    while turns:
        said = [each.said for each in audio]
        parts = prompt.parts(turns, images=len(images), context=context, audio=said)
        sample = join_spans(parts, [*images, *audio], name)
        if len(sample) <= max_length:
            return sample if sample.supervised.any() else None
        if images_placed:
            images = images[turns[0][0].count(MARK) :]
        if audio_placed:
            audio = audio[turns[0][0].count(AUDIO_MARK) :]
        turns = turns[1:]
    return None
