"""Parses the questions and answers of a row, in the formats in common use.

LLaVA's format is ``conversations`` of ``from`` (``human``, ``gpt``) and ``value``. Others have ``messages`` of ``role``
(``system``, ``user``, ``assistant``) and ``content``, which may be a list of parts as in OpenAI's API; images are named
by ``image``, by ``images``, or by a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmphi.data.schema import Turn
from mmphi.errors import DataError
from mmphi.text.prompt import MARK

LISTS, IMAGES = ("conversations", "messages"), ("image", "images")
ASKS, ANSWERS, SYSTEM = ("human", "user"), ("gpt", "assistant", "model"), ("system",)
KNOWN = frozenset(ASKS + ANSWERS + SYSTEM)
SHOWN_KEYS = 8


@dataclass(slots=True)
class ParsedConversation:
    """Parsed content of a row.

    Attributes:
        turns: Questions and their answers.
        images: Images, as the row names them.
    """

    turns: list[Turn] = field(default_factory=list)
    images: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Message:
    """One message: its role, its text with marks ``<image>``, and the images that it names itself."""

    role: str
    text: str
    images: list[str]

    @property
    def marks(self) -> int:
        return self.text.count(MARK)


def parse_row(row: Any, note: Callable[[str], None]) -> ParsedConversation:
    """Parse a row.

    Args:
        row: Row as loaded from the file.
        note: Called with a description of each part that is left out of a kept row.

    Raises:
        DataError: If the row cannot be used; the error's ``what`` is a countable reason.
    """
    if not isinstance(row, dict):
        raise DataError(f"a row is a {type(row).__name__}, not an object")
    name = next((name for name in LISTS if isinstance(row.get(name), list)), None)
    if name is None:
        keys = ", ".join(list(map(str, row))[:SHOWN_KEYS]) or "no key"
        raise DataError(f"no list called conversations or messages (it has {keys})")
    messages = [_message(message) for message in row[name]]
    leading = _share_out(messages, _named(row))
    return _turns(messages, leading, note)


def _share_out(messages: list[_Message], named: list[str]) -> list[str]:
    """Assign the images that a row names to the messages with marks; without marks, return them as leading images.

    Raises:
        DataError: If the numbers of marks and images differ, or an answer has an image.
    """
    if not (named or any(message.images or message.marks for message in messages)):
        return []
    asking = [message for message in messages if message.role in ASKS]
    if any(message.images or (message.marks and named) for message in messages if message.role in ANSWERS):
        raise DataError("an image in an answer")
    own = sum(len(message.images) for message in asking)
    if own and named:
        raise DataError("images are named by the row and by its messages")
    if own:
        if any(message.marks != len(message.images) for message in asking):
            raise DataError("another number of <image> than images")
        return []
    marks = sum(message.marks for message in asking)
    if not named:
        if any(_stands_alone(line) for message in asking if message.marks for line in message.text.split("\n")):
            raise DataError("<image> in a row without an image")
        return []  # The word inside a line is ordinary text.
    if marks == 0:
        return named
    if marks != len(named):
        raise DataError("another number of <image> than images")
    for message in asking:
        message.images, named = named[: message.marks], named[message.marks :]
    return []


def _turns(messages: Sequence[_Message], leading: list[str], note: Callable[[str], None]) -> ParsedConversation:
    """Questions with their answers; unpaired ones are left out, with their images.

    Raises:
        DataError: If there is no answered question, or a system message after the first one.
    """
    found = ParsedConversation(images=list(leading))
    system: list[str] = []
    question: _Message | None = None
    begun = False
    for message in messages:
        if message.role in SYSTEM:
            if begun:
                raise DataError("a system message after the first question")
            system.append(message.text)
        elif message.role in ASKS:
            begun = True
            if question is not None:
                message = _Message(message.role, f"{question.text}\n{message.text}", question.images + message.images)
            question = message
        elif question is None:
            begun = True
            note("an answer without its question is left out")
        else:
            found.turns.append(Turn(question.text, message.text))
            found.images += question.images
            question = None
    if question is not None:
        note("a question without its answer is left out")
    if not found.turns:
        raise DataError("no answered question")
    if len(found.images) == 1 and not leading:
        # A single image is moved before everything, as in LLaVA's own training.
        found.turns = [Turn(turn.question.replace(MARK, "").strip(), turn.answer) for turn in found.turns]
    if any(system):
        first = found.turns[0]
        found.turns[0] = Turn("\n".join([*filter(None, system), first.question]), first.answer)
    return found


def _message(message: Any) -> _Message:
    """Parsed message of a row.

    Raises:
        DataError: If the message is malformed, or has an unknown role or part.
    """
    if not isinstance(message, dict):
        raise DataError("malformed turn")
    role = message.get("from", message.get("role"))
    content = message.get("value", message.get("content"))
    if not isinstance(role, str):
        raise DataError("malformed turn")
    if role not in KNOWN:
        raise DataError(f"unknown role {role[:20]!r}")
    if isinstance(content, str):
        return _Message(role, content.strip(), [])
    if not isinstance(content, list):
        raise DataError("malformed turn")
    texts, images = [], list[str]()
    for part in content:
        if not isinstance(part, Mapping):
            raise DataError("malformed turn")
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"].strip())
        elif kind in ("image", "image_url"):
            texts.append(MARK)
            images += _path(part)
        else:
            raise DataError(f"a part of an unknown type {str(kind)[:20]!r}")
    return _Message(role, "\n".join(filter(None, texts)), images)


def _path(part: Mapping[str, Any]) -> list[str]:
    """The image of a part, in a list; empty if the row names it."""
    value = next((part[name] for name in ("image", "path", "image_url", "url") if part.get(name)), None)
    value = value.get("url") if isinstance(value, Mapping) else value
    if value is not None and not isinstance(value, str):
        raise DataError("malformed image")
    return [] if value is None else [value.removeprefix("file://")]


def _named(row: Mapping[str, Any]) -> list[str]:
    """The images that a row names outside its turns."""
    for name in IMAGES:
        value = row.get(name)
        images = value if isinstance(value, list) else [value] if value else []
        paths = [each.get("path") if isinstance(each, Mapping) else each for each in images]
        if not all(isinstance(path, str) and path for path in paths):
            raise DataError("malformed image")
        if paths:
            return [str(path) for path in paths]
    return []


def _stands_alone(line: str) -> bool:
    """Whether a line begins or ends with the mark of an image, as in LLaVA's rows."""
    return line.startswith(MARK) or line.endswith(MARK)
