"""Parses messages in the format of OpenAI's API into a conversation."""

from __future__ import annotations

import base64
import binascii
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmphi.data.content_hash import content_digest
from mmphi.data.images import image_bytes
from mmphi.data.in_memory import image_reference
from mmphi.data.schema import AudioRef, ImageRef
from mmphi.errors import DataError
from mmphi.text.prompt import AUDIO, AUDIO_MARK, MARK, SHOWN

MAX_IMAGES, MAX_RECORDINGS, MAX_LETTERS = 16, 16, 1_000_000
TURN_LETTERS = 8
DATA_URI = "data:"
FROM_URL, SPACES = bytes.maketrans(b"-_", b"+/"), b" \t\r\n\v\f"
NO_FILE = Path()


class MessageError(DataError):
    """An invalid message."""


@dataclass(frozen=True)
class Conversation:
    """A conversation whose last question is unanswered.

    Attributes:
        system: System message; empty for none.
        turns: Questions and answers; the last answer is ``None``. In a question, :data:`~mmphi.text.prompt.SHOWN` and
            :data:`~mmphi.text.prompt.AUDIO` mark the places of images and recordings; ``<image>`` is ordinary text.
        images: Images of each turn, in order.
        audio: Recordings of each turn, in order.
    """

    system: str
    turns: tuple[tuple[str, str | None], ...]
    images: tuple[tuple[ImageRef, ...], ...]
    audio: tuple[tuple[AudioRef, ...], ...]

    @property
    def letters(self) -> int:
        """Characters of all texts, plus :data:`TURN_LETTERS` per turn for the tokens of its role markers."""
        texts = sum(len(question) + len(answer or "") for question, answer in self.turns)
        return len(self.system) + texts + TURN_LETTERS * len(self.turns)

    @property
    def leading(self) -> int:
        """Number of images if all of them precede the first question, as in training; otherwise 0."""
        count = len(self.images[0])
        before = SHOWN * count
        rest = self.turns[0][0].removeprefix(before)
        return count if not any(self.images[1:]) and SHOWN not in rest else 0

    def newest(self, count: int) -> Conversation:
        """Return a copy with the newest ``count`` turns and their images and recordings."""
        return replace(self, turns=self.turns[-count:], images=self.images[-count:], audio=self.audio[-count:])


def parse_messages(
    messages: Sequence[Mapping[str, Any]], *, files: bool = True, allow: Callable[[str], bytes] | None = None
) -> Conversation:
    """Parse messages into a conversation.

    Args:
        messages: Mappings with a ``role`` (``system``, ``user``, ``assistant``) and a ``content``: a text, or a list of
            parts ``{"type": "text", "text": ...}``, ``{"type": "image", "image": path or bytes}``,
            ``{"type": "audio", "audio": path or bytes}``, OpenAI's ``image_url`` with a ``data:`` URI and
            ``input_audio`` with base64 or a ``data:`` URI, or vLLM's ``audio_url``. Consecutive messages of one role
            are joined. All system messages are joined, wherever they occur; without a user message they are the
            question.
        files: Whether messages may refer to local files; ``False`` for messages from another machine.
        allow: Fetches an image from a URL that is no ``data:`` URI; without it such URLs are refused.

    Returns:
        The conversation, with the content of its images: files that are overwritten later do not change it.

    Raises:
        MessageError: If a message is invalid; names the message.
        ImageError: If an image file is missing, empty or too large.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise MessageError("there is no message", "give a list with a question: [{'role': 'user', 'content': '...'}]")
    reading = _Reading(files, allow)
    for number, message in enumerate(messages, 1):
        try:
            reading.message(message)
        except MessageError as error:
            raise MessageError(f"message {number}: {error.what}", error.hint) from error
    return reading.done()


@dataclass
class _Turn:
    """Consecutive questions, then consecutive answers."""

    questions: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    images: list[ImageRef] = field(default_factory=list)
    audio: list[AudioRef] = field(default_factory=list)


class _Reading:
    def __init__(self, files: bool, allow: Callable[[str], bytes] | None) -> None:
        self.files, self.allow = files, allow
        self.system: list[str] = []
        self.turns: list[_Turn] = []
        self.letters = self.images = self.recordings = 0

    def message(self, message: Any) -> None:
        if not isinstance(message, Mapping) or "role" not in message:
            raise MessageError("it has no role", "a message is {'role': ..., 'content': ...}")
        role, content = message["role"], message.get("content")
        if role in ("system", "developer"):
            self.system += [text] if (text := self._text_alone(content)) else []
        elif role == "user":
            if "content" not in message:
                raise MessageError("it has no content")
            if content is not None and not isinstance(content, str) and not content:
                raise MessageError("it is empty", "give a question, an image or a recording")
            self._ask(*self._parts(content))  # Empty or null content counts as a question, as in OpenAI's API.
        elif role == "assistant":
            if message.get("tool_calls") or message.get("function_call"):
                raise MessageError("calls of tools are not supported", "send the transcript")
            self._answer(self._text_alone(content))
        else:
            raise MessageError(f"the role {_short(role)} is not supported", "system, developer, user or assistant")

    def _ask(self, text: str, images: tuple[ImageRef, ...], audio: tuple[AudioRef, ...]) -> None:
        """Add a question, or continue the open one."""
        if not self.turns or self.turns[-1].answers:
            self.turns.append(_Turn())
        turn = self.turns[-1]
        turn.questions.append(text)
        turn.images += images
        turn.audio += audio

    def _answer(self, text: str) -> None:
        """Add an answer to the current turn; a leading answer (greeting) gets an empty question."""
        if not self.turns:
            self._ask("", (), ())
        self.turns[-1].answers.append(text)

    def done(self) -> Conversation:
        if not self.turns and self.system:  # Some clients send only a system message.
            self._ask("\n".join(self.system), (), ())
            self.system = []
        if not self.turns:
            raise MessageError("there is no question", "the last message is the user's")
        if self.turns[-1].answers:
            raise MessageError("the last message is an answer", "the last message is the user's")
        images, audio = (tuple(tuple(getattr(turn, kind)) for turn in self.turns) for kind in ("images", "audio"))
        turns = [("\n".join(turn.questions), "\n".join(turn.answers)) for turn in self.turns]
        completed: list[tuple[str, str | None]] = [*turns[:-1], (turns[-1][0], None)]
        return Conversation("\n".join(self.system), tuple(completed), images, audio)

    def _text_alone(self, content: Any) -> str:
        text, images, audio = self._parts(content)
        if images or audio:
            raise MessageError("images and recordings are allowed only in user messages")
        return text

    def _parts(self, content: Any) -> tuple[str, tuple[ImageRef, ...], tuple[AudioRef, ...]]:
        content = "" if content is None else content
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, Sequence) or not all(isinstance(part, Mapping) for part in parts):
            raise MessageError("its content is neither a text nor a list of parts")
        lines: list[str] = []  # Consecutive images and recordings share a line.
        images: list[ImageRef] = []
        audio: list[AudioRef] = []
        medium = False
        for part in parts:
            kind, before = part.get("type"), medium
            if kind == "text":
                if text := self._text(part.get("text")):
                    lines.append(text)
                    medium = False
                continue
            medium = True
            if kind in ("image", "image_url"):
                self.images += 1
                _at_most(self.images, MAX_IMAGES, "images")  # Checked before another image is fetched.
                images.append(self._image(part))
                place = SHOWN
            elif kind in ("audio", "input_audio", "audio_url"):
                self.recordings += 1
                _at_most(self.recordings, MAX_RECORDINGS, "recordings")
                audio.append(self._recording(part))
                place = AUDIO
            else:
                raise MessageError(f"a part of the type {_short(kind)} is unknown", "text, image_url or input_audio")
            lines[len(lines) - before :] = [(lines[-1] if before else "") + place]
        question = "\n".join(lines)
        for typed, place, count in ((MARK, SHOWN, len(images)), (AUDIO_MARK, AUDIO, len(audio))):
            question = _where_typed(question, typed, place, count)
        return question, tuple(images), tuple(audio)

    def _text(self, text: Any) -> str:
        if not isinstance(text, str):
            raise MessageError("the text of a part is not a string")
        self.letters += len(text)
        if self.letters > MAX_LETTERS:
            raise MessageError(f"there are more than {MAX_LETTERS:,} characters", "send a shorter text")
        if not is_encodable(text):
            raise MessageError("a text holds half of a surrogate pair, which is no character", "send valid UTF-8")
        return text.replace("\0", "")  # NUL delimits the markers of images and recordings.

    def _image(self, part: Mapping[str, Any]) -> ImageRef:
        given = part.get("image")
        if self.files and given is not None and not isinstance(given, bytes | str | Path):
            return image_reference(given)  # A PIL image, an array or a tensor.
        if isinstance(given, bytes):
            return image_from_memory(given)
        if isinstance(given, str | Path):
            return image_from_memory(image_bytes(self._path(given)), Path(given))
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        if not isinstance(url, str):
            raise MessageError("an image part has no content", "image_url: {url: data:image/png;base64,...}")
        if url[: len(DATA_URI)].lower() == DATA_URI:
            return image_from_memory(_decoded(url, "an image"))
        if self.allow is None:
            raise MessageError(f"{url[:100]} is not fetched", "send the image itself, as a data: URI")
        return image_from_memory(self.allow(url))

    def _path(self, given: str | Path) -> Path:
        if not self.files:
            raise MessageError("local file paths are not accepted here", "send what the file holds")
        return Path(given)

    def _recording(self, part: Mapping[str, Any]) -> AudioRef:
        given = part.get("audio")
        if isinstance(given, bytes):
            return recording_from_memory(given)
        if isinstance(given, str | Path):
            return AudioRef(str(given), self._path(given))
        inner, url = part.get("input_audio"), part.get("audio_url")
        data = inner.get("data") if isinstance(inner, Mapping) else url.get("url") if isinstance(url, Mapping) else url
        if not isinstance(data, str):
            raise MessageError("a recording has no data", "input_audio: {data: BASE64, format: wav}")
        if part.get("type") == "audio_url" and data[: len(DATA_URI)].lower() != DATA_URI:
            raise MessageError(f"{data[:100]} is not fetched", "send the recording itself, as a data: URI")
        return recording_from_memory(_decoded(data, "a recording"))


def is_encodable(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8; tokenizers refuse lone surrogates, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _at_most(count: int, most: int, name: str) -> None:
    if count > most:
        raise MessageError(f"there are more than {most} {name}")


def _short(value: Any) -> str:
    """Shortened representation of a received value of any size, for error messages."""
    return reprlib.repr(value)


def _where_typed(question: str, typed: str, place: str, count: int) -> str:
    """Move the markers ``place`` to the typed marks, if a question has as many marks as images or recordings."""
    if not count or question.count(typed) != count:
        return question
    lines = [line for line in question.split("\n") if line.replace(place, "") or not line]
    return "\n".join(lines).replace(place, "").replace(typed, place)


def _decoded(data: str, what: str) -> bytes:
    """Decode base64 or a ``data:`` URI; line breaks, missing padding and the URL-safe alphabet are accepted."""
    if data[: len(DATA_URI)].lower() == DATA_URI:
        data = data.partition(",")[2]
    try:
        # C functions of linear time: a regular expression would block all other threads for seconds.
        plain = data.encode("ascii").translate(FROM_URL, SPACES).rstrip(b"=")
        found = base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MessageError(f"{what} is no base64: {error}") from error
    if not found:
        raise MessageError(f"{what} is empty")
    return found


def image_from_memory(content: bytes, path: Path = NO_FILE) -> ImageRef:
    """Return an image in memory, named by the digest of its content.

    Args:
        content: Content of an image file.
        path: File path for error messages.
    """
    return ImageRef(content_digest(content), path, content=content)


def recording_from_memory(content: bytes) -> AudioRef:
    """Return a recording in memory, named by the digest of its content."""
    return AudioRef(content_digest(content), content)
