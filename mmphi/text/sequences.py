"""Conversations as token sequences: what is given, what is learned, and the spans where features stand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mmphi.text.prompt import MARK, Part, Prompt, places_images


class Span(NamedTuple):
    """A stretch of a sequence where features stand in place of tokens.

    Attributes:
        kind: ``image``.
        reference: What the features are of, as their source knows it.
        start: Position of the first.
        length: How many they are.
    """

    kind: str
    reference: Any
    start: int
    length: int


class Input(NamedTuple):
    """What a span shall stand for: an image, and how many features it has."""

    kind: str
    reference: Any
    length: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence, ready to be packed.

    Attributes:
        input_ids: Token ids, int32, shape (length,); positions of spans hold 0.
        supervised: Which tokens are to be predicted, bool, shape (length,).
        spans: Where features stand, in order.
        name: Where the sequence came from, for messages.
    """

    input_ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    spans: tuple[Span, ...] = ()
    name: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)


def join(parts: Iterable[Part], inputs: Sequence[Input] = (), name: str = "") -> Sample:
    """Lay the parts of a prompt end to end, each input in the next span of its kind.

    The first token is never supervised: nothing stands before it to predict it from.
    """
    ids: list[int] = []
    supervised: list[bool] = []
    spans: list[Span] = []
    waiting = list(inputs)
    for part in parts:
        length = len(part.ids)
        if part.span:
            (chosen,) = [i for i in waiting if i.kind == part.span][:1]
            waiting.remove(chosen)
            spans.append(Span(chosen.kind, chosen.reference, len(ids), chosen.length))
            length = chosen.length
        ids.extend(part.ids or [0] * length)
        supervised.extend([part.supervised] * length)
    if supervised:
        supervised[0] = False
    return Sample(np.asarray(ids, np.int32), np.asarray(supervised, np.bool_), tuple(spans), name)


def encode(
    turns: Sequence[tuple[str, str | None]],
    inputs: Sequence[Input],
    prompt: Prompt,
    max_length: int,
    name: str = "",
    context: str = "",
) -> Sample | None:
    """A conversation as a sequence of at most ``max_length`` tokens.

    Where it is too long, the oldest turns go first, with the images that they place, and the answer stays whole (LLaVA
    truncates after expanding the image, and so eats answers).

    Args:
        turns: Questions and answers.
        inputs: The images that it is about, in their order.
        prompt: Writes it.
        max_length: In tokens, features included.
        name: Where it came from, for messages.
        context: Text that stands where images would.

    Returns:
        ``None`` where even the last turn alone is too long, or no token of it is supervised.
    """
    placed = places_images([question for question, _ in turns], len(inputs))
    while turns:
        sample = join(prompt.parts(turns, images=len(inputs), context=context), inputs, name)
        if len(sample) <= max_length:
            return sample if sample.supervised.any() else None
        if placed:
            inputs = inputs[turns[0][0].count(MARK) :]
        turns = turns[1:]
    return None
