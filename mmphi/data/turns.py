"""The questions and answers of a row, in the forms that such files have in the field.

LLaVA's own is ``conversations`` of ``from`` (``human``, ``gpt``) and ``value``. Others have ``messages`` of ``role``
(``system``, ``user``, ``assistant``) and ``content``, which may be a list of parts as OpenAI's API has it; images are
named by ``image``, by ``images``, or by a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmphi.data.records import Turn
from mmphi.errors import DataError
from mmphi.text.prompt import MARK

LISTS, ROLES, TEXTS, IMAGES = ("conversations", "messages"), ("from", "role"), ("value", "content"), ("image", "images")
ASKS, ANSWERS, SYSTEM = ("human", "user"), ("gpt", "assistant", "model"), ("system",)
SHOWN_KEYS = 8


@dataclass
class Conversation:
    """What a row says.

    Attributes:
        turns: Questions and their answers.
        images: As the row names them.
    """

    turns: list[Turn] = field(default_factory=list)
    images: list[str] = field(default_factory=list)


def conversation_of(row: Any, note: Callable[[str], None]) -> Conversation:
    """Read a row.

    Args:
        row: As it is in the file.
        note: Told what of a row is left out, though the row is kept.

    Raises:
        DataError: If it cannot be used; its ``what`` is a reason that can be counted.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"a row is a {type(row).__name__}, not an object")
    name = next((name for name in LISTS if isinstance(row.get(name), list)), None)
    if name is None:
        keys = ", ".join(list(map(str, row))[:SHOWN_KEYS]) or "no key"
        raise DataError(f"no list called conversations or messages (it has {keys})")
    found = Conversation(images=_named(row))
    system: list[str] = []
    question: str | None = None
    begun = False
    for message in row[name]:
        role, text, images = _message(message)
        found.images += images
        if role in SYSTEM:
            if begun:
                raise DataError("a system message after the first question")
            system.append(text)
        elif role in ASKS:
            begun = True
            question = text if question is None else f"{question}\n{text}"
        elif question is None:
            begun = True
            note("an answer without its question is left out")
        else:
            found.turns.append(Turn(question, text))
            question = None
    if question is not None:
        note("a question without its answer is left out")
    if not found.turns:
        raise DataError("no answered question")
    if system and "".join(system):
        first = found.turns[0]
        found.turns[0] = Turn("\n".join([*filter(None, system), first.question]), first.answer)
    return _placed(found)


def _message(message: Any) -> tuple[str, str, list[str]]:
    """Role, text and images of a message."""
    if not isinstance(message, Mapping):
        raise DataError("malformed turn")
    role = next((message[name] for name in ROLES if name in message), None)
    content = next((message[name] for name in TEXTS if name in message), None)
    if not isinstance(role, str):
        raise DataError("malformed turn")
    if role not in (*ASKS, *ANSWERS, *SYSTEM):
        raise DataError(f"unknown role {role[:20]!r}")
    if isinstance(content, str):
        return role, content.strip(), []
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
    return role, "\n".join(filter(None, texts)), images


def _path(part: Mapping[str, Any]) -> list[str]:
    """The image of a part; none where the row names it."""
    value = next((part[name] for name in ("image", "path", "image_url", "url") if part.get(name)), None)
    value = value.get("url") if isinstance(value, Mapping) else value
    if value is not None and not isinstance(value, str):
        raise DataError("malformed image")
    return [] if value is None else [value.removeprefix("file://")]


def _named(row: Mapping[str, Any]) -> list[str]:
    """The images that a row names beside its turns."""
    for name in IMAGES:
        value = row.get(name)
        images = value if isinstance(value, list) else [value] if value else []
        paths = [each.get("path") if isinstance(each, Mapping) else each for each in images]
        if not all(isinstance(path, str) and path for path in paths):
            raise DataError("malformed image")
        if paths:
            return [str(path) for path in paths]
    return []


def _placed(found: Conversation) -> Conversation:
    """The same, with ``<image>`` as prompts take it.

    One image stands before everything, wherever the row has it: LLaVA's own training moves it there.

    Raises:
        DataError: If there are other places than images.
    """
    marks = sum(turn.question.count(MARK) for turn in found.turns)
    if not found.images:
        if any(_stands_alone(line) for turn in found.turns for line in (turn.question.split("\n"))):
            raise DataError("<image> in a row without an image")
        return found  # What is written of the word within a text is text.
    if len(found.images) == 1 and marks <= 1:
        found.turns = [Turn(turn.question.replace(MARK, "").strip(), turn.answer) for turn in found.turns]
    elif marks not in (0, len(found.images)):
        raise DataError("another number of <image> than images")
    return found


def _stands_alone(line: str) -> bool:
    """Whether a line begins or ends with the place of an image, as LLaVA's rows have it."""
    return line.startswith(MARK) or line.endswith(MARK)
