"""Evaluation on recordings: word error rate, agreement with answers to typed text, and loss with shuffled inputs."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmphi.data.schema import AudioRef, Example
from mmphi.evaluation.grounding import Grounding
from mmphi.evaluation.wer import total_errors, word_errors
from mmphi.models.audio.audio_features import AudioFeatureSource
from mmphi.models.multimodal import Multimodal, Question
from mmphi.tracking.tracker import Tracker

TIMED = 8  # Number of examples on which the speed of feature extraction is measured.


def shuffled_recordings(examples: Sequence[Example], seed: int) -> list[Example]:
    """Return the conversations with each recording replaced by another; a single recording is kept."""
    recordings = {audio.id: audio for e in examples for audio in e.audio}
    circle = sorted(recordings)
    random.Random(seed).shuffle(circle)
    following = dict(zip(circle, circle[1:] + circle[:1], strict=True))
    return [replace(e, audio=tuple(recordings[following[a.id]] for a in e.audio)) for e in examples]


def audio_gain(model: Multimodal, examples: Sequence[Example], seed: int = 0) -> Grounding:
    """Return the loss on the answers with the right and with shuffled recordings.

    Args:
        model: Model to score.
        examples: Conversations about at least two recordings.
        seed: Seed of the shuffle.
    """
    nats, tokens = model.losses(examples)
    other, other_tokens = model.losses(shuffled_recordings(examples, seed))
    return Grounding(nats / max(tokens, 1), other / max(other_tokens, 1))


@dataclass(frozen=True)
class SpokenMeasures:
    """Extent of an evaluation on recordings.

    Attributes:
        max_recordings: Largest number of examples; 0 takes all.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Answers generated at once.
        seed: Seed of the shuffle.
    """

    max_recordings: int = 0
    max_new_tokens: int = 48
    batch_size: int = 32
    seed: int = 0


def measure_speech(
    model: Multimodal,
    examples: Sequence[Example],
    chosen: SpokenMeasures,
    tracker: Tracker,
    prefix: str,
    fresh: AudioFeatureSource,
) -> dict[str, float]:
    """Evaluate a model on recordings with known transcripts, and record the metrics.

    Args:
        model: Model to evaluate.
        examples: Conversations about one recording each; the answer is the transcript (repetition task) or known.
        chosen: Extent of the evaluation.
        tracker: Run to record in.
        prefix: Prefix of every metric's name, without the slash.
        fresh: Feature source of the same kind with empty caches, to measure its speed.

    Returns:
        Loss and its reduction by the right recording; agreement of answers to the recording and to its typed
        transcript, as equal texts and as shared words; for the repetition task the word error rate, and that with typed
        words, which is the language model's part of it; for known answers the share of exact matches, with recordings
        and with typed words; seconds of feature extraction and of generation, and tokens, per second of speech.
    """
    examples = list(examples)[: chosen.max_recordings or None]
    measured = audio_gain(model, examples, chosen.seed)
    seconds = sum(_seconds(audio) for e in examples for audio in e.audio)
    spans = [span for e in examples for span in model.open_prompt(None, "", e.audio).spans]
    begun = time.perf_counter()
    for e, span in zip(examples[:TIMED], spans, strict=False):
        fresh.inputs(e.audio)
        fresh.rows([span.reference])
    feature_s = time.perf_counter() - begun
    transcripts = [e.attributes["said"] for e in examples]

    def answers(prompts: Sequence[Question]) -> list[str]:
        return [answer.text for answer in model.generate(prompts, chosen.max_new_tokens, chosen.batch_size)]

    begun = time.perf_counter()
    audio_answers = answers([(None, e.turns[0].question, e.audio, e.context) for e in examples])
    answered_s = time.perf_counter() - begun
    typed = [e.turns[0].question.replace("<audio>", words) for e, words in zip(examples, transcripts, strict=True)]
    text_answers = answers([(None, question, (), e.context) for e, question in zip(examples, typed, strict=True)])
    metrics = {
        "loss": measured.loss,
        "audio_gain": measured.gain,
        "hearing_s_per_s": feature_s / max(1e-9, sum(_seconds(a) for e in examples[:TIMED] for a in e.audio)),
        "answering_s_per_s": answered_s / max(seconds, 1e-9),
        "tokens_per_s": sum(span.length for span in spans) / max(seconds, 1e-9),
    }
    rows: list[dict[str, Any]] = [
        {"audio": e.id, "said": words} for e, words in zip(examples, transcripts, strict=True)
    ]
    wanted = [e.turns[0].answer for e in examples]
    if wanted == transcripts:
        errors = [word_errors(words, text) for words, text in zip(transcripts, audio_answers, strict=True)]
        own = [word_errors(words, text) for words, text in zip(transcripts, text_answers, strict=True)]
        metrics |= {"wer": total_errors(errors).rate, "typed_wer": total_errors(own).rate}
        for row, text, each in zip(rows, audio_answers, errors, strict=True):
            row |= {"repeated": text, "wer": round(each.rate, 4)}
        audio_answers = answers([(None, "", e.audio) for e in examples])
        text_answers = answers([(None, words) for words in transcripts])
    else:
        metrics |= {"exact_match": _same(audio_answers, wanted), "typed_exact_match": _same(text_answers, wanted)}
        for row, answer in zip(rows, wanted, strict=True):
            row |= {"right answer": answer}
    overlap = sum(_overlap(a, b) for a, b in zip(audio_answers, text_answers, strict=True)) / len(audio_answers)
    metrics |= {"answer_agreement": _same(audio_answers, text_answers), "answer_overlap": overlap}
    for row, one, two in zip(rows, audio_answers, text_answers, strict=True):
        row |= {"answer": one, "answer to the typed words": two}
    tracker.table(f"{prefix}_heard".replace("/", "_"), rows)
    named = {f"{prefix}/{name}": value for name, value in metrics.items()}
    tracker.metrics(named)
    return named


def _same(one: Sequence[str], two: Sequence[str]) -> float:
    """Share of pairs of equal answers."""
    return sum(a == b for a, b in zip(one, two, strict=True)) / max(1, len(one))


def _overlap(one: str, two: str) -> float:
    """Share of words that two answers have in common, in order: 2 * matches / all words, difflib's ratio."""
    from difflib import SequenceMatcher

    return SequenceMatcher(a=one.split(), b=two.split(), autojunk=False).ratio()


def _seconds(audio: AudioRef) -> float:
    from mmphi.data.audio import audio_seconds, read_audio

    stated = audio_seconds(audio.source)
    return stated if stated is not None else read_audio(audio.source).seconds
