"""Conversations about recordings for audio projector training, in an audio form and a text form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmphi.data.schema import Example, ReadReport
from mmphi.errors import AudioError, StoreError
from mmphi.models.multimodal import Multimodal
from mmphi.text.tokenized_example import TokenizedExample


def with_readable_audio(model: Multimodal, examples: Sequence[Example], report: ReadReport) -> list[Example]:
    """Returns the conversations whose recordings can be decoded; the others are counted in ``report``."""
    return [e for e in examples if _is_readable(model, e, report)]


def _is_readable(model: Multimodal, example: Example, report: ReadReport) -> bool:
    try:
        model.inputs(example.audio)
    except AudioError as error:
        report.drop_kept(example.source, example.id, error.reason)
    except StoreError:
        report.drop_kept(example.source, example.id, "unreadable recording")
    else:
        return True
    return False


def text_answers(model: Multimodal, examples: Sequence[Example], tokens: int) -> list[Example]:
    """Returns the conversations with the model's answers to their transcripts; those with empty answers are dropped."""
    prompts = [(None, transcript_conversation(e).turns[0].question) for e in examples]
    answers = model.generate(prompts, tokens)
    return [
        replace(e, turns=(replace(e.turns[0], answer=answer.text),))
        for e, answer in zip(examples, answers, strict=True)
        if answer.text
    ]


def transcript_conversation(example: Example) -> Example:
    """Returns a conversation with its recording replaced by the transcript."""
    (turn,) = example.turns
    transcript = example.attributes.get("said", turn.answer)
    return replace(example, audio=(), turns=(replace(turn, question=turn.question.replace("<audio>", transcript)),))


def audio_text_pairs(
    model: Multimodal, examples: Sequence[Example], report: ReadReport | None = None
) -> tuple[list[TokenizedExample], list[TokenizedExample]]:
    """Returns the token sequences of conversations in audio form, and in text form with transcripts.

    Conversations that are too long in either form are left out and counted in ``report``.
    """
    with_audio, with_text = [], []
    for example in examples:
        audio, text = model.encode(example), model.encode(transcript_conversation(example))
        if audio is not None and text is not None:
            with_audio.append(audio)
            with_text.append(text)
        elif report is not None:
            report.drop_kept(example.source, example.id, f"over {model.max_length} tokens")
    return with_audio, with_text
