"""``mmphi chat``: a conversation in the terminal, with streamed answers."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmphi.config.arguments import CommandParser
from mmphi.errors import MmphiError
from mmphi.serving.ask import sampling_of, sampling_options
from mmphi.serving.chat_session import COMMANDS, ChatSession, EndSession
from mmphi.serving.model_args import model_options

PROMPT = "> "


def parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    made = CommandParser(
        prog="mmphi chat", description="Talk to a trained model in the terminal; /help lists what can be typed there."
    )
    model_options(made)
    made.add_argument("--system", default="", help="system message")
    made.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="PATH",
        help="image that is sent with the first question; repeatable",
    )
    made.add_argument("--load", default="", metavar="FILE", help="continue a conversation that /save wrote")
    sampling_options(made)
    return made


def main(arguments: Sequence[str]) -> int:
    """Run ``mmphi chat``."""
    from mmphi.generation.messages import parse_messages

    options = parser().parse_args(list(arguments))
    if options.image:  # Before torch is imported and a model is loaded, which take seconds.
        images = [{"type": "image", "image": Path(path).expanduser()} for path in options.image]
        parse_messages([{"role": "user", "content": images}])
    sampling = sampling_of(options)

    import mmphi
    from mmphi.serving.model_args import chosen_model

    choice = chosen_model(options)
    print(f"model: {choice.label}", file=sys.stderr)
    model = mmphi.load(choice.name, whisper=options.whisper)
    model.context = options.context
    talk = ChatSession(model, sampling)
    for command in (
        ([f"/system {options.system}"] if options.system else [])
        + ([f"/load {options.load}"] if options.load else [])
        + [f"/image {path}" for path in options.image]
    ):
        list(talk.respond(command))
    if isinstance(sys.stdin, io.TextIOWrapper):  # Invalid bytes must not end the conversation.
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        if model.questions:
            print(f"It was trained on questions such as: {'  '.join(model.questions)}")
        print("/image PATH shows an image, /help lists the commands, /quit or Ctrl-D leaves.")
        run(talk, _typed())
    else:
        run(talk, iter(sys.stdin.readline, ""))
    return 0


def run(talk: ChatSession, lines: Iterator[str]) -> None:
    """Answer each line until the input ends.

    Ctrl-C stops an answer. An error is printed, and the conversation continues from its state before the line.
    """
    for line in lines:
        answer = ""
        try:
            for piece in talk.respond(line.rstrip("\n")):
                answer += piece
                print(piece, end="", flush=True)
        except EndSession:
            return
        except KeyboardInterrupt:
            print(" ...", end="", flush=True)
        except MmphiError as error:
            _complain(str(error), answer)
            continue
        except Exception as error:  # For example out of memory: the conversation must survive it.
            _complain(f"{type(error).__name__}: {error}", answer)
            continue
        if answer:
            print()


def _complain(error: str, answer: str) -> None:
    """Print an error, on a new line after a partial answer."""
    if answer:
        print(flush=True)
    print(f"error: {error}", file=sys.stderr, flush=True)


def _typed() -> Iterator[str]:
    """Lines typed at a prompt with history and completion of commands and paths."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import NestedCompleter, PathCompleter
    from prompt_toolkit.history import FileHistory

    from mmphi.data.content_hash import cache_folder

    cache_folder().mkdir(parents=True, exist_ok=True)
    paths = {command: PathCompleter(expanduser=True) for command in ("/image", "/audio", "/save", "/load")}
    session: PromptSession[str] = PromptSession(
        history=FileHistory(str(cache_folder() / "chat_history")),
        completer=NestedCompleter.from_nested_dict({command: paths.get(command) for command in COMMANDS}),
        complete_while_typing=False,
    )
    while True:
        try:
            yield session.prompt(PROMPT)
        except KeyboardInterrupt:
            continue  # At the prompt, Ctrl-C clears the line, as in a shell.
        except EOFError:
            return
