"""Conversations answered: one as it is said, or many at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmphi.generation.engine import Engine, GenerationRequest
from mmphi.generation.messages import Conversation, MessageError, parse_messages
from mmphi.generation.prompt_builder import open_prompt
from mmphi.generation.sampling import SamplingParams
from mmphi.text.tokenized_example import TokenizedExample


def start_answer(engine: Engine, messages: Sequence[Mapping[str, Any]], **how: Any) -> Iterator[str]:
    """The answer to the last of some messages, in pieces as it is said; what is wrong with them is said at once."""
    sampling, asked = SamplingParams(**how), parse_messages(messages)
    return engine.stream(_prompt(engine, asked, sampling), sampling)


def _prompt(engine: Engine, asked: Conversation, sampling: SamplingParams) -> TokenizedExample:
    """A conversation, with room for an answer."""
    return open_prompt(engine.model, asked, engine.room(sampling))[0]


def read_conversations(
    conversations: Sequence[Sequence[Mapping[str, Any]]], *, files: bool = True
) -> list[Conversation]:
    """Read conversations.

    Args:
        conversations: Messages of each.
        files: Whether they may name files of this machine.

    Raises:
        MessageError: Says which conversation and message is wrong, and how.
    """
    read = []
    for number, messages in enumerate(conversations, 1):
        try:
            read.append(parse_messages(messages, files=files))
        except MessageError as error:
            raise MessageError(f"conversation {number}, {error.what}", error.hint) from error
    return read


def answer_conversations(
    engine: Engine, conversations: Sequence[Conversation], sampling: SamplingParams
) -> list[GenerationRequest]:
    """Answer the last question of each conversation, as many at once as the engine has slots.

    Args:
        engine: Who answers.
        conversations: What was said.
        sampling: How the answers are chosen; with a seed each is the one that it would be alone.

    Returns:
        One answer per conversation, in order; all are ended.

    Raises:
        MmphiError: If one cannot be answered; none of the others is answered then.
    """
    prompts = [_prompt(engine, each, sampling) for each in conversations]
    answers = [engine.submit(prompt, sampling) for prompt in prompts]
    try:
        while not all(answer.reason for answer in answers):
            engine.step()
            if error := next((answer.error for answer in answers if answer.error is not None), None):
                raise error
    finally:
        for answer in answers:
            engine.cancel(answer)
    return answers
