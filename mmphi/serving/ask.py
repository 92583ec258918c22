"""``mmphi ask``: one question and its answer, for scripts."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmphi.config.arguments import CommandParser
from mmphi.errors import MmphiError
from mmphi.serving.model_args import model_options

STDIN = "-"


def parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    made = CommandParser(
        prog="mmphi ask",
        description="Ask a trained model a question about images and recordings, typed or spoken.",
        epilog="examples:\n  mmphi ask --image photo.jpg 'what is this?'\n"
        "  mmphi ask --image photo.jpg --audio question.mp3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("question", nargs="?", default="", help="what to ask; - reads it from standard input")
    model_options(made)
    made.add_argument(
        "--image", action="append", default=[], type=Path, metavar="PATH", help="image of the question; repeatable"
    )
    made.add_argument(
        "--audio", action="append", default=[], type=Path, metavar="PATH", help="recording of the question; repeatable"
    )
    made.add_argument("--system", default="", help="system message")
    made.add_argument(
        "--json", action="store_true", help="print the answer as JSON, with transcripts, token counts and times"
    )
    sampling_options(made)
    return made


def sampling_options(made: argparse.ArgumentParser) -> None:
    """Add the sampling options."""
    made.add_argument("--max-tokens", type=int, default=256, help="longest answer [256]")
    made.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0 is greedy [0]")
    made.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the most probable tokens with this total probability [1]"
    )
    made.add_argument("--seed", type=int, help="random seed of the sampling [a new one each time]")
    made.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="text before which the answer ends; repeatable"
    )


def sampling_of(options: argparse.Namespace) -> Any:
    """Sampling parameters from the options of :func:`sampling_options`."""
    from mmphi.generation.sampling import SamplingParams

    return SamplingParams(
        options.max_tokens, options.temperature, options.top_p, options.seed, tuple(dict.fromkeys(options.stop))
    )


def main(arguments: Sequence[str]) -> int:
    """Run ``mmphi ask``; with ``--json``, an error is also printed as JSON."""
    options = parser().parse_args(list(arguments))
    try:
        return _answer(options)
    except MmphiError as error:
        if options.json:
            print(json.dumps({"error": {"message": error.what, "hint": error.hint, "type": type(error).__name__}}))
        raise


def _answer(options: argparse.Namespace) -> int:
    from mmphi.data.audio import check_recording_file
    from mmphi.generation.messages import MessageError, parse_messages

    question = sys.stdin.read().strip() if options.question == STDIN else options.question
    messages = [{"role": "system", "content": options.system}] if options.system else []
    parts = [{"type": "image", "image": path} for path in options.image]
    parts += [{"type": "audio", "audio": path} for path in options.audio]
    parts += [{"type": "text", "text": question}] if question else []
    if not parts:
        raise MessageError(
            "the question is empty: no text, image or recording was given",
            "for example: mmphi ask --image photo.jpg 'what is this?'\n  or: mmphi ask --audio question.mp3",
        )
    messages.append({"role": "user", "content": parts})
    conversation = parse_messages(messages)  # Before torch is imported and a transcriber is loaded, which take seconds.
    for path in options.audio:
        check_recording_file(path)
    sampling = sampling_of(options)

    import mmphi
    from mmphi.generation.engine import Engine
    from mmphi.generation.prompt_builder import open_prompt
    from mmphi.serving.model_args import chosen_model

    choice = chosen_model(options)
    print(f"model: {choice.label}", file=sys.stderr)
    model = mmphi.load(choice.name, whisper=options.whisper)
    engine = Engine(model, slots=1, length=options.context)
    begun = time.perf_counter()
    prompt, _ = open_prompt(model, conversation, engine.room(sampling))
    answering = engine.submit(prompt, sampling)
    first = 0.0
    while not answering.reason:
        engine.step()
        first = first or time.perf_counter() - begun
        if not options.json:
            print(answering.take(), end="", flush=True)
    if answering.error is not None:
        raise answering.error
    if not options.json:
        print(answering.take())
        return 0
    found = {
        "answer": answering.text,
        "reason": answering.reason,
        "heard": [each.transcript for each in model.inputs([*conversation.audio[0]])],
        "model": choice.short,
        "prompt_tokens": len(prompt),
        "tokens": answering.tokens,
        "first_token_s": round(first, 4),
        "seconds": round(time.perf_counter() - begun, 4),
    }
    print(json.dumps(found, ensure_ascii=False))
    return 0
