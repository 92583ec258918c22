"""Conversations as token sequences: what is given, what is learned, where the image's features go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmphi.data.records import Example, ImageRef, ReadReport
from mmphi.models.prompt import Part, Prompt


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence, ready to be packed.

    Attributes:
        input_ids: Token ids, int32, shape (length,); positions of the image hold 0.
        supervised: Which tokens are to be predicted, bool, shape (length,).
        image: The image whose features stand in the sequence, or ``None``.
        image_start: Position of its first feature; the features are contiguous.
        image_tokens: How many features it has.
        name: Where the sequence came from, for messages.
    """

    input_ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    image: ImageRef | None = None
    image_start: int = 0
    image_tokens: int = 0
    name: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)


def join(parts: Iterable[Part], image: ImageRef | None, image_tokens: int, name: str = "") -> Sample:
    """Lay the parts of a prompt end to end.

    The first token is never supervised: nothing stands before it to predict it from.
    """
    ids: list[int] = []
    supervised: list[bool] = []
    image_start = 0
    for part in parts:
        if part.is_image:
            image_start = len(ids)
        length = image_tokens if part.is_image else len(part.ids)
        ids.extend([0] * length if part.is_image else part.ids)
        supervised.extend([part.supervised] * length)
    if supervised:
        supervised[0] = False
    return Sample(
        input_ids=np.asarray(ids, np.int32),
        supervised=np.asarray(supervised, np.bool_),
        image=image,
        image_start=image_start,
        image_tokens=image_tokens if image is not None else 0,
        name=name,
    )


def encode(example: Example, prompt: Prompt, image_tokens: int, max_length: int) -> Sample | None:
    """A conversation as a sequence of at most ``max_length`` tokens.

    Where it is too long, the oldest turns go first and the answer stays whole (LLaVA truncates after expanding the
    image, and so eats answers).

    Returns:
        ``None`` where even the last turn alone is too long, or no token of it is supervised.
    """
    turns = [(turn.question, turn.answer) for turn in example.turns]
    while turns:
        parts = prompt.parts(turns, image=example.image is not None)
        sample = join(parts, example.image, image_tokens, f"{example.source}/{example.id}")
        if len(sample) <= max_length:
            return sample if sample.supervised.any() else None
        turns = turns[1:]
    return None


def encode_all(
    examples: Iterable[Example], prompt: Prompt, image_tokens: int, max_length: int, report: ReadReport
) -> list[Sample]:
    """Encode every example, counting those that do not fit as dropped."""
    samples = []
    for example in examples:
        sample = encode(example, prompt, image_tokens, max_length)
        if sample is None:
            report.drop_kept(example.source, example.id, f"over {max_length} tokens")
        else:
            samples.append(sample)
    return samples
