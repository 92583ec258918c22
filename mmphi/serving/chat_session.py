"""A user's chat session: its messages, the attachments of the next question, and its commands."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmphi.data.images import MAX_FILE_BYTES, open_image
from mmphi.errors import DataError, MmphiError, SettingsError

if TYPE_CHECKING:
    from mmphi.generation.sampling import SamplingParams
    from mmphi.models.multimodal import Multimodal

HELP = {
    "/image PATH": "show an image with the next question",
    "/audio PATH": "send a recording with the next question; alone it is the question (an empty line sends it)",
    "/system TEXT": "set the system message and start a new conversation",
    "/set NAME VALUE": "max_tokens, temperature, top_p, seed or stop of the answers that follow",
    "/undo": "remove the last question and its answer",
    "/reset": "forget the conversation",
    "/save FILE": "write the conversation as JSON",
    "/load FILE": "continue a saved conversation",
    "/help": "this list",
    "/quit": "quit; Ctrl-D does the same",
}
COMMANDS = [each.partition(" ")[0] for each in HELP]


class EndSession(Exception):  # noqa: N818  # It is not an error.
    """Raised by ``/quit``."""


@dataclass
class ChatSession:
    """A conversation with a model.

    Attributes:
        model: Model that answers.
        sampling: Sampling parameters of the next answers.
        messages: The conversation so far, as :func:`~mmphi.generation.messages.parse_messages` takes it.
        waiting: Images and recordings that are sent with the next question.
    """

    model: Multimodal
    sampling: SamplingParams
    messages: list[dict[str, Any]] = field(default_factory=list)
    waiting: list[dict[str, Any]] = field(default_factory=list)

    def respond(self, line: str) -> Iterator[str]:
        """Yield the output for a line: the pieces of an answer, or the output of a command.

        A question that cannot be answered is not added to the messages; an interrupted answer is added as far as it
        was generated.

        Raises:
            EndSession: At ``/quit``.
            MmphiError: If the line fails; the messages stay as they were, and a question's attachments are dropped.
        """
        from mmphi.generation.messages import is_encodable

        if not is_encodable(line):
            raise DataError("the line holds half of a surrogate pair, which is no character", "paste it again")
        if line.startswith("/"):
            name, _, rest = line.strip().partition(" ")
            if name not in COMMANDS:
                raise SettingsError(f"there is no command {name}", f"there are {', '.join(COMMANDS)}")
            act: Callable[[str], str] = getattr(self, f"_{name[1:]}")
            yield act(rest.strip())
            return
        if line.strip() or self.waiting:
            yield from self._ask(line.strip())

    def _ask(self, question: str) -> Iterator[str]:
        parts = [*self.waiting, *([{"type": "text", "text": question}] if question else [])]
        sent = [*self.messages, {"role": "user", "content": parts}]
        how = {name: getattr(self.sampling, name) for name in self.sampling.__dataclass_fields__}
        answer: list[str] = []
        pieces: Iterator[str] = iter(())
        try:
            pieces = self.model.stream(sent, **how)
            for piece in pieces:
                answer.append(piece)
                yield piece
        except MmphiError:
            self.waiting = []  # One of them may be the cause.
            raise
        except (GeneratorExit, KeyboardInterrupt):
            pieces.close()  # type: ignore[attr-defined]  # A generator; closing it frees its slot.
            self._keep(sent, answer)
            raise
        self._keep(sent, answer)

    def _keep(self, sent: list[dict[str, Any]], answer: list[str]) -> None:
        self.messages = [*sent, {"role": "assistant", "content": "".join(answer)}]
        self.waiting = []

    def _image(self, path: str) -> str:
        return self._with("image", path)

    def _audio(self, path: str) -> str:
        return self._with("audio", path)

    def _with(self, kind: str, path: str) -> str:
        if not path:
            raise DataError(f"/{kind} needs a path", f"/{kind} PATH")
        found = _path(path.strip("'\""))
        try:
            if not found.is_file():
                raise DataError(f"there is no file {path!r}", f"/{kind} PATH")
            large = found.stat().st_size > MAX_FILE_BYTES
            # Keep the current content, because the file may be overwritten. Larger files are read when transcribed.
            given = str(found.absolute()) if large else found.read_bytes()
            if kind == "image":
                open_image(found)  # Refuse an invalid image now and not with the next question.
        except OSError as error:
            raise DataError(f"{found} cannot be read: {error.strerror}", "check that you may read it") from error
        self.waiting.append({"type": kind, kind: given})
        return f"{found.name} is sent with the next question{self._second_image() if kind == 'image' else ''}"

    def _second_image(self) -> str:
        """A warning if the conversation already has an image: most models are trained on one."""
        parts = [
            part for message in self.messages if isinstance(message["content"], list) for part in message["content"]
        ]
        earlier = any(part["type"].startswith("image") for part in parts)
        return "; the conversation already has an image: /reset starts a new conversation" if earlier else ""

    def _system(self, text: str) -> str:
        self._reset("")
        self.messages = [{"role": "system", "content": text}] if text else []
        return "the system message is set; the conversation starts again"

    def _set(self, words: str) -> str:
        name, _, value = words.partition(" ")
        kinds: dict[str, Callable[[str], Any]] = {
            "max_tokens": int,
            "temperature": float,
            "top_p": float,
            "seed": lambda text: int(text) if text else None,
            "stop": lambda text: (text,) if text else (),
        }
        if name not in kinds:
            raise SettingsError(f"there is no setting {name!r}", f"there are {', '.join(kinds)}")
        try:
            changed = kinds[name](value.strip())
        except ValueError as error:
            raise SettingsError(f"{name} = {value!r} is no number", f"/set {name} NUMBER") from error
        self.sampling = replace(self.sampling, **{name: changed})
        return f"{name} = {changed}"

    def _undo(self, _: str) -> str:
        roles = [message["role"] for message in self.messages]
        answered = len(roles)
        while answered and roles[answered - 1] == "assistant":
            answered -= 1
        end = answered
        while end and roles[end - 1] == "user":
            end -= 1
        if end == answered:
            return "there is no question to remove"
        self.messages = self.messages[:end]
        return "the last question and its answer are removed"

    def _reset(self, _: str) -> str:
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self.waiting = []
        return "the conversation is cleared"

    def _save(self, path: str) -> str:
        if not path:
            raise DataError("/save needs a file", "/save chat.json")
        try:
            messages = [_as_json(message) for message in self.messages]
            text = json.dumps(messages, indent=1, ensure_ascii=False) + "\n"
            _path(path).write_text(text, encoding="utf-8")
        except (OSError, ValueError) as error:  # A path with a NUL raises ValueError.
            raise DataError(f"{path} cannot be written: {error}", "choose another place") from error
        return f"{len(self.messages)} messages are in {path}"

    def _load(self, path: str) -> str:
        from mmphi.generation.messages import parse_messages

        try:
            messages = json.loads(_path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path} is no conversation: {error}", "give a file that /save wrote") from error
        if not isinstance(messages, list):
            raise DataError(f"{path} is no conversation", "give a file that /save wrote")
        if messages:
            parse_messages([*messages, {"role": "user", "content": "?"}])  # Check that it can be continued.
        system = [message for message in self.messages if message["role"] == "system"]
        has_own = any(message["role"] in ("system", "developer") for message in messages)
        self.messages, self.waiting = (messages if has_own else [*system, *messages]), []
        return f"{len(messages)} messages"

    def _help(self, _: str) -> str:
        return "\n".join(f"  {command:<16} {what}" for command, what in HELP.items())

    def _quit(self, _: str) -> str:
        raise EndSession


def _path(text: str) -> Path:
    """Path from user input, with ``~`` expanded.

    Raises:
        DataError: If the home directory cannot be determined.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise DataError(f"{text} cannot be found: {error}", "write the whole path") from error


def _as_json(message: dict[str, Any]) -> dict[str, Any]:
    """A message in OpenAI's format, with the bytes of its images and recordings in base64."""
    if not isinstance(message.get("content"), list):
        return message
    parts = []
    for part in message["content"]:
        content = part.get(part["type"])
        if isinstance(content, bytes):
            data = base64.b64encode(content).decode()
            if part["type"] == "image":
                part = {"type": "image_url", "image_url": {"url": f"data:;base64,{data}"}}
            else:
                part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
        parts.append(part)
    return {**message, "content": parts}
