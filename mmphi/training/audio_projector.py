"""Training of a projector between recordings and a frozen language model, by distillation.

The language model's outputs for a recording are trained towards its outputs for the transcript. The settings are
those of :class:`mmphi.config.speech.SpeechSettings`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from mmphi.config.speech import SpeechSettings
from mmphi.data.schema import Example, ReadReport
from mmphi.errors import DataError
from mmphi.evaluation.speech import audio_gain
from mmphi.models.multimodal import Multimodal
from mmphi.text.packing import to_device
from mmphi.tracking.tracker import PrefixedTracker, Tracker
from mmphi.training.audio_conversations import audio_text_pairs, text_answers, with_readable_audio
from mmphi.training.conversation_validation import log_packing
from mmphi.training.ctc_alignment import CTCAlignmentDataset, CTCAlignmentLoss, token_error_rate
from mmphi.training.distillation import DistillationTask, collate_pairs, distillation_dataset
from mmphi.training.token_vocabulary import token_vocabulary
from mmphi.training.trainer import train

VALIDATION_BATCH = 16  # Held-out conversations whose logits are in memory at once.


def train_audio_projector(
    model: Multimodal,
    examples: Sequence[Example],
    settings: SpeechSettings,
    *,
    folder: Path,
    tracker: Tracker,
    report: ReadReport,
) -> dict[str, float]:
    """Train the audio projector of a model; everything else stays frozen.

    Args:
        model: Model with an audio projector, which is trained in place.
        examples: Conversations of all splits, each of one turn about one recording.
        settings: Audio input, warm-up and optimisation.
        folder: Where checkpoints are written.
        tracker: Records metrics and ``report``.
        report: Counts the unusable conversations.

    Returns:
        Numbers of parameters, supervised tokens, recordings and steps, by metric name.

    Raises:
        DataError: If more recordings are unusable than ``max_bad_share`` allows, or none is left.
    """
    examples = with_readable_audio(model, examples, report)
    training = [e for e in examples if e.split == "train"]
    held_out = [e for e in examples if e.split == "validation"]
    if settings.answers == "own":
        training, held_out = (text_answers(model, some, settings.answer_tokens) for some in (training, held_out))
    log_packing(model, "speech", tracker)
    with_audio, with_text = audio_text_pairs(model, training, report)
    tracker.table("data_read", list(report.rows()))
    _check_report(report, settings)
    if settings.audio_input == "encoder" and settings.alignment_steps:
        align_to_transcripts(model, training, held_out, settings, folder=folder / "align", tracker=tracker)
    end = model.language.prompt.end[-1]
    steps = distillation_dataset(with_audio, with_text, model.sources, settings, end, layout=model.packed.layout)
    assert model.speech is not None
    figures: dict[str, float] = {
        "speech/parameters": sum(p.numel() for p in model.speech.parameters()),
        "speech/supervised_tokens": steps.supervised(),
        "speech/recordings": len(with_audio),
    }
    tracker.metrics(figures)
    task = DistillationTask(model.packed, settings.temperature, settings.end_weight)
    with model.packed.recomputing(settings.gradient_checkpointing):
        trained = train(
            task,
            steps,
            settings,
            folder=folder,
            tracker=tracker,
            title="speech",
            validate=_validation(model, task, held_out, end) if held_out else None,
        )
    return {**figures, "speech/steps": trained.steps}


def align_to_transcripts(
    model: Multimodal,
    training: Sequence[Example],
    held_out: Sequence[Example],
    settings: SpeechSettings,
    *,
    folder: Path,
    tracker: Tracker,
) -> None:
    """Train encoder frames to predict the tokens of the transcripts by CTC, without the language model.

    Args:
        model: Model whose audio projector is trained in place.
        training: Training conversations about recordings.
        held_out: Conversations on which the token error rate is measured; may be empty.
        settings: ``alignment_steps`` and its batch size and learning rate.
        folder: Where checkpoints are written.
        tracker: Records metrics, prefixed with ``align/``.
    """
    known, words = token_vocabulary(model.language, [e.attributes["said"] for e in [*training, *held_out]])
    assert model.speech is not None
    task = CTCAlignmentLoss(model.speech, model.language.embeddings(known))
    recordings = [e.audio[0] for e in [*training, *held_out]]
    count, own = len(training), {"steps": settings.alignment_steps, "batch_size": settings.alignment_batch_size}
    shape = {
        **own,
        "learning_rate": settings.alignment_learning_rate,
        "gradient_accumulation_steps": 1,
        "optimizer": "adamw",
    }
    steps = CTCAlignmentDataset(recordings[:count], words[:count], model.audio_source, **own, seed=settings.seed)

    def measure(_: int) -> Mapping[str, float]:
        return {"val/token_error_rate": token_error_rate(task, recordings[count:], words[count:], model.audio_source)}

    train(
        task,
        steps,
        settings.model_copy(update=shape),
        folder=folder,
        tracker=PrefixedTracker(tracker, "align"),
        title="align",
        validate=measure if held_out else None,
    )


def _check_report(report: ReadReport, settings: SpeechSettings) -> None:
    if report.bad_share > settings.max_bad_share or not report.kept.total():
        raise DataError(
            f"{report.bad_share:.1%} of the recordings cannot be used; at most {settings.max_bad_share:.1%} may be\n"
            + report.table(),
            "repair them, or raise speech.max_bad_share",
        )


def _validation(
    model: Multimodal, task: DistillationTask, held_out: Sequence[Example], end: int
) -> Callable[[int], Mapping[str, float]]:
    """Returns a function that measures divergence, loss, and the gain of the right recording over another one."""
    with_audio, with_text = audio_text_pairs(model, held_out)

    def measure(_: int) -> Mapping[str, float]:
        measured = audio_gain(model, held_out)
        nats, tokens = 0.0, 0
        with torch.no_grad():
            for first in range(0, len(with_audio), VALIDATION_BATCH):
                some = np.s_[first : first + VALIDATION_BATCH]
                batch = collate_pairs(with_audio[some], with_text[some], model.sources, end, layout=model.packed.layout)
                nats += float(task(**to_device(batch, model.device)))
                tokens += len(batch["ends"])
        return {"val/divergence": nats / max(tokens, 1), "val/loss": measured.loss, "val/audio_gain": measured.gain}

    return measure
