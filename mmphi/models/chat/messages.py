"""Messages as OpenAI's API has them, and what a model is asked by them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmphi.data.digests import content_digest
from mmphi.data.images import image_bytes
from mmphi.data.records import AudioRef, ImageRef
from mmphi.errors import DataError
from mmphi.text.prompt import AUDIO, AUDIO_MARK, MARK, SHOWN

MAX_IMAGES, MAX_RECORDINGS, MAX_LETTERS = 16, 16, 1_000_000
DATA_URI = "data:"
NO_FILE = Path()


class MessageError(DataError):
    """A message that cannot be read."""


@dataclass(frozen=True)
class Conversation:
    """What was said so far, the last question still open.

    Attributes:
        system: What the model shall be; empty where nothing was said of it.
        turns: Questions and answers; the last answer is ``None``. In a question :data:`~mmphi.text.prompt.SHOWN` and
            :data:`~mmphi.text.prompt.AUDIO` stand for its images and recordings; ``<image>`` is text like any other.
        images: Of each turn, in order.
        audio: Recordings of each turn, in order.
    """

    system: str
    turns: tuple[tuple[str, str | None], ...]
    images: tuple[tuple[ImageRef, ...], ...]
    audio: tuple[tuple[AudioRef, ...], ...]

    @property
    def letters(self) -> int:
        """Letters of all texts."""
        return len(self.system) + sum(len(question) + len(answer or "") for question, answer in self.turns)

    @property
    def leading(self) -> int:
        """How many images stand before everything else, as in training; 0 where one stands anywhere else."""
        count = len(self.images[0])
        before = SHOWN * count
        rest = self.turns[0][0].removeprefix(before)
        return count if not any(self.images[1:]) and SHOWN not in rest else 0

    def newest(self, count: int) -> Conversation:
        """The same with its newest questions and answers alone, and with what they are about."""
        return replace(self, turns=self.turns[-count:], images=self.images[-count:], audio=self.audio[-count:])


def conversation(
    messages: Sequence[Mapping[str, Any]], *, files: bool = True, allow: Callable[[str], bytes] | None = None
) -> Conversation:
    """Read messages.

    Args:
        messages: Each with a ``role`` (``system``, ``user``, ``assistant``) and a ``content``: a text, or parts, each
            ``{"type": "text", "text": ...}``, ``{"type": "image", "image": path or bytes}``,
            ``{"type": "audio", "audio": path or bytes}``, or as OpenAI has them: ``image_url`` with a ``data:`` URI,
            ``input_audio`` with base64.
        files: Whether they may name files of this machine; not where they come from another.
        allow: Fetches an image from any other URL; none is fetched without it.

    Returns:
        The conversation, with the content of its images: a file that is overwritten later is another image.

    Raises:
        MessageError: Says which message is wrong, and how.
        ImageError: If the file of an image is missing, empty or too large.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise MessageError("there is no message", "give a list with a question: [{'role': 'user', 'content': '...'}]")
    reading = _Reading(files, allow)
    for number, message in enumerate(messages, 1):
        try:
            reading.message(message, first=number == 1)
        except MessageError as error:
            raise MessageError(f"message {number}: {error.what}", error.hint) from error
    return reading.done()


class _Reading:
    def __init__(self, files: bool, allow: Callable[[str], bytes] | None) -> None:
        self.files, self.allow = files, allow
        self.system = ""
        self.turns: list[tuple[str, str | None]] = []
        self.images: list[tuple[ImageRef, ...]] = []
        self.audio: list[tuple[AudioRef, ...]] = []
        self.letters = 0

    def message(self, message: Any, *, first: bool) -> None:
        if not isinstance(message, Mapping) or "role" not in message:
            raise MessageError("it has no role", "a message is {'role': ..., 'content': ...}")
        role, content = message["role"], message.get("content")
        if role in ("system", "developer"):
            if not first:
                raise MessageError("what the model shall be comes first", "put the system message before the others")
            self.system = self._text_alone(content)
        elif role == "user":
            if self.turns and self.turns[-1][1] is None:
                raise MessageError("a question follows a question", "join the two, or put the answer between them")
            text, images, audio = self._parts(content)
            if not text and not images and not audio:
                raise MessageError("it is empty")
            self.turns.append((text, None))
            self.images.append(images)
            self.audio.append(audio)
        elif role == "assistant":
            if not self.turns or self.turns[-1][1] is not None:
                raise MessageError("an answer follows no question")
            self.turns[-1] = self.turns[-1][0], self._text_alone(content)
        else:
            raise MessageError(f"the role {role!r} is unknown", "system, user or assistant")

    def done(self) -> Conversation:
        if not self.turns:
            raise MessageError("there is no question", "the last message is the user's")
        if self.turns[-1][1] is not None:
            raise MessageError("the last message is an answer", "the last message is the user's")
        for name, of_turns, most in (("images", self.images, MAX_IMAGES), ("recordings", self.audio, MAX_RECORDINGS)):
            if (count := sum(len(own) for own in of_turns)) > most:
                raise MessageError(f"there are {count} {name}, and at most {most} are taken")
        return Conversation(self.system, tuple(self.turns), tuple(self.images), tuple(self.audio))

    def _text_alone(self, content: Any) -> str:
        text, images, audio = self._parts(content)
        if images or audio:
            raise MessageError("only a user's message has images and recordings")
        return text

    def _parts(self, content: Any) -> tuple[str, tuple[ImageRef, ...], tuple[AudioRef, ...]]:
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, Sequence) or not all(isinstance(part, Mapping) for part in parts):
            raise MessageError("its content is neither a text nor a list of parts")
        lines: list[str] = []  # Media that follow one another share a line.
        images: list[ImageRef] = []
        audio: list[AudioRef] = []
        medium = False
        for part in parts:
            kind, before = part.get("type"), medium
            medium = kind != "text"
            if kind == "text":
                lines.append(self._text(part.get("text")))
                continue
            if kind in ("image", "image_url"):
                images.append(self._image(part))
                place = SHOWN
            elif kind in ("audio", "input_audio"):
                audio.append(self._recording(part))
                place = AUDIO
            else:
                raise MessageError(f"a part of the type {kind!r} is unknown", "text, image_url or input_audio")
            lines[len(lines) - before :] = [(lines[-1] if before else "") + place]
        question = "\n".join(line for line in lines if line)
        for typed, place, count in ((MARK, SHOWN, len(images)), (AUDIO_MARK, AUDIO, len(audio))):
            question = _where_typed(question, typed, place, count)
        return question, tuple(images), tuple(audio)

    def _text(self, text: Any) -> str:
        if not isinstance(text, str):
            raise MessageError("a text is no text")
        self.letters += len(text)
        if self.letters > MAX_LETTERS:
            raise MessageError(f"there are more than {MAX_LETTERS:,} letters", "say it in fewer words")
        return text.replace("\0", "")  # Which begins and ends the places of images and recordings.

    def _image(self, part: Mapping[str, Any]) -> ImageRef:
        given = part.get("image")
        if isinstance(given, bytes):
            return image_of(given)
        if isinstance(given, str | Path):
            return image_of(image_bytes(self._path(given)), Path(given))
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        if not isinstance(url, str):
            raise MessageError(
                "an image says neither where it is nor what", "image_url: {url: data:image/png;base64,...}"
            )
        if url.startswith(DATA_URI):
            return image_of(_decoded(url.partition(",")[2], "an image"))
        if self.allow is None:
            raise MessageError(f"{url[:100]} is not fetched", "send the image itself, as a data: URI")
        return image_of(self.allow(url))

    def _path(self, given: str | Path) -> Path:
        if not self.files:
            raise MessageError("files of this machine are not read for others", "send what the file holds")
        return Path(given)

    def _recording(self, part: Mapping[str, Any]) -> AudioRef:
        given = part.get("audio")
        if isinstance(given, bytes):
            return recording_of(given)
        if isinstance(given, str | Path):
            return AudioRef(str(given), self._path(given))
        inner = part.get("input_audio")
        data = inner.get("data") if isinstance(inner, Mapping) else None
        if not isinstance(data, str):
            raise MessageError("a recording has no data", "input_audio: {data: BASE64, format: wav}")
        return recording_of(_decoded(data, "a recording"))


def _where_typed(question: str, typed: str, place: str, count: int) -> str:
    """A question whose images or recordings stand where it says so, if it says so as often as it has any."""
    if not count or question.count(typed) != count:
        return question
    lines = [line for line in question.split("\n") if line.replace(place, "") or not line]
    return "\n".join(lines).replace(place, "").replace(typed, place)


def _decoded(data: str, what: str) -> bytes:
    try:
        found = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MessageError(f"{what} is no base64: {error}") from error
    if not found:
        raise MessageError(f"{what} is empty")
    return found


def image_of(content: bytes, path: Path = NO_FILE) -> ImageRef:
    """An image in memory, named by its content.

    Args:
        content: What its file holds.
        path: The file, for messages.
    """
    return ImageRef(content_digest(content), path, content=content)


def recording_of(content: bytes) -> AudioRef:
    """A recording in memory, named by its content."""
    return AudioRef(content_digest(content), content)
