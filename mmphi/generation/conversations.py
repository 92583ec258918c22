"""Answers to conversations: one streamed, or many in a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmphi.generation.engine import Engine, GenerationRequest
from mmphi.generation.messages import Conversation, MessageError, parse_messages
from mmphi.generation.prompt_builder import open_prompt
from mmphi.generation.sampling import SamplingParams
from mmphi.text.tokenized_example import TokenizedExample


def start_answer(engine: Engine, messages: Sequence[Mapping[str, Any]], **how: Any) -> Iterator[str]:
    """Return an iterator over the answer's pieces; invalid messages raise here, before the iteration."""
    sampling, conversation = SamplingParams(**how), parse_messages(messages)
    return engine.stream(_prompt(engine, conversation, sampling), sampling)


def _prompt(engine: Engine, conversation: Conversation, sampling: SamplingParams) -> TokenizedExample:
    """Prompt of a conversation that leaves room for the answer."""
    return open_prompt(engine.model, conversation, engine.room(sampling))[0]


def read_conversations(
    conversations: Sequence[Sequence[Mapping[str, Any]]], *, files: bool = True
) -> list[Conversation]:
    """Parse the messages of several conversations.

    Args:
        conversations: Messages of each conversation.
        files: Whether messages may refer to local files.

    Raises:
        MessageError: If a message is invalid; names the conversation and the message.
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
    """Answer the last question of each conversation, in batches of the engine's slots.

    Args:
        engine: Engine that generates.
        conversations: Parsed conversations.
        sampling: Sampling parameters; with a seed, each answer is the same as when it is generated alone.

    Returns:
        One finished request per conversation, in order.

    Raises:
        MmphiError: If one conversation cannot be answered; the others are then cancelled.
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
