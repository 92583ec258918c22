"""Stage ``speech``: what is between recordings and the frozen language model, trained on what it says when it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmphi.config import LanguageSettings
from mmphi.config.audio import AudioSettings
from mmphi.config.declared_view import SettingsView
from mmphi.config.speech import SpeechSettings
from mmphi.errors import DataError, SettingsError
from mmphi.pipeline.stage import Context, Cost, Stage
from mmphi.stages.shared_models import check_training, evaluating
from mmphi.stages.speech_data import audio_text_pairs, conversations, speech_model, text_answers, with_readable_audio

if TYPE_CHECKING:
    from mmphi.data.schema import Example, ReadReport
    from mmphi.models.multimodal import Multimodal

AT_ONCE = 16  # Held-out conversations whose logits are in memory at once.


def upstream(settings: SettingsView) -> tuple[str, ...]:
    """Stored frames where they are read, and the language model where it is the one trained here."""
    chosen, needed = settings(SpeechSettings), []
    if settings(LanguageSettings).model == "pretrain" and not chosen.model:
        needed.append("pretrain")
    if chosen.link == "encoder" and chosen.features == "cached":
        needed.append("listen")
    return tuple(needed)


def check(settings: SettingsView) -> None:
    """Recordings, a place for them in the question, and a batch for every pass.

    Raises:
        SettingsError: If one is missing.
    """
    chosen = settings(SpeechSettings)
    check_training("speech", chosen)
    if not chosen.path:
        raise SettingsError(
            "speech.path names no recordings", "give a CSV whose header is audio,transcript: --path recordings.csv"
        )
    if chosen.question.count("<audio>") != 1:
        raise SettingsError(
            "speech.question does not say where the recording stands",
            'write <audio> in it once: --question "Repeat after me: <audio>"',
        )
    if chosen.link != "transcript" and settings(AudioSettings).backend != "openai":
        raise SettingsError(
            f"faster-whisper does not give what the link {chosen.link} needs", "set audio.backend to openai"
        )


def cost(_: SettingsView) -> Cost:
    """A projection and its optimiser are small."""
    return Cost(disk_bytes=4 * 4 * 3 * 4096 * 4096)


def run(ctx: Context) -> Mapping[str, float]:
    """Train, and save a model that loads alone."""
    from mmphi.data.schema import ReadReport
    from mmphi.training.conversation_validation import log_packing
    from mmphi.training.distillation import DistillationTask, distillation_dataset
    from mmphi.training.trainer import train

    chosen, report = ctx.settings(SpeechSettings), ReadReport()
    examples = conversations(ctx, report)
    model = speech_model(ctx)
    examples = with_readable_audio(model, examples, report)
    training = [e for e in examples if e.split == "train"]
    held = [e for e in examples if e.split == "validation"]
    if chosen.answers == "own":
        training, held = (text_answers(model, some, chosen.answer_tokens) for some in (training, held))
    log_packing(model, "speech", ctx.tracker)
    heard, read = audio_text_pairs(model, training, report)
    ctx.tracker.table("data_read", list(report.rows()))
    _check_report(report, chosen)
    if chosen.link == "encoder" and chosen.alignment_steps:
        align(ctx, model, training, held)
    end = model.language.prompt.end[-1]
    steps = distillation_dataset(heard, read, model.sources, chosen, end, layout=model.packed.layout)
    assert model.speech is not None
    figures: dict[str, float] = {
        "speech/parameters": sum(p.numel() for p in model.speech.parameters()),
        "speech/supervised_tokens": steps.supervised(),
        "speech/recordings": len(heard),
    }
    ctx.tracker.metrics(figures)
    task = DistillationTask(model.packed, chosen.temperature, chosen.end_weight)
    with model.packed.recomputing(chosen.gradient_checkpointing):
        trained = train(
            task,
            steps,
            chosen,
            folder=ctx.folder,
            tracker=ctx.tracker,
            title="speech",
            validate=_validation(model, task, held, end) if held else None,
        )
    if ctx.first:
        model.save_pretrained(ctx.folder)
        _write_card(ctx, model)
    return {**figures, "speech/steps": trained.steps}


def align(ctx: Context, model: Multimodal, training: Sequence[Example], held: Sequence[Example]) -> None:
    """Let frames learn to name the words that are said, before the language model takes part."""
    from mmphi.tracking.tracker import PrefixedTracker
    from mmphi.training.ctc_alignment import CTCAlignmentDataset, CTCAlignmentLoss, token_error_rate
    from mmphi.training.token_vocabulary import token_vocabulary
    from mmphi.training.trainer import train

    chosen = ctx.settings(SpeechSettings)
    known, words = token_vocabulary(model.language, [e.attributes["said"] for e in [*training, *held]])
    assert model.speech is not None
    task = CTCAlignmentLoss(model.speech, model.language.embeddings(known))
    recordings = [e.audio[0] for e in [*training, *held]]
    count, own = len(training), {"steps": chosen.alignment_steps, "batch_size": chosen.alignment_batch_size}
    shape = {
        **own,
        "learning_rate": chosen.alignment_learning_rate,
        "gradient_accumulation_steps": 1,
        "optimizer": "adamw",
    }
    steps = CTCAlignmentDataset(recordings[:count], words[:count], model.audio_source, **own, seed=chosen.seed)

    def measure(_: int) -> Mapping[str, float]:
        return {"val/token_error_rate": token_error_rate(task, recordings[count:], words[count:], model.audio_source)}

    train(
        task,
        steps,
        chosen.model_copy(update=shape),
        folder=ctx.folder / "align",
        tracker=PrefixedTracker(ctx.tracker, "align"),
        title="align",
        validate=measure if held else None,
    )


def _check_report(report: ReadReport, chosen: SpeechSettings) -> None:
    if report.bad_share > chosen.max_bad_share or not report.kept.total():
        raise DataError(
            f"{report.bad_share:.1%} of the recordings cannot be used; at most {chosen.max_bad_share:.1%} may be\n"
            + report.table(),
            "mend them, or raise speech.max_bad_share",
        )


def _validation(
    model: Multimodal, task: Any, held: Sequence[Example], end: int
) -> Callable[[int], Mapping[str, float]]:
    """Loss on held-out recordings, and what the right recording is worth."""
    import numpy as np
    import torch

    from mmphi.evaluation.speech import audio_gain
    from mmphi.text.packing import to_device
    from mmphi.training.distillation import collate_pairs

    heard, read = audio_text_pairs(model, held)

    def measure(_: int) -> Mapping[str, float]:
        measured = audio_gain(model, held)
        nats, tokens = 0.0, 0
        with torch.no_grad():
            for first in range(0, len(heard), AT_ONCE):
                some = np.s_[first : first + AT_ONCE]
                batch = collate_pairs(heard[some], read[some], model.sources, end, layout=model.packed.layout)
                nats += float(task(**to_device(batch, model.device)))
                tokens += len(batch["ends"])
        return {"val/divergence": nats / max(tokens, 1), "val/loss": measured.loss, "val/hearing_gain": measured.gain}

    return measure


def _write_card(ctx: Context, model: Multimodal) -> None:
    from mmphi.models.model_card import language_title, shape_text, write_card

    chosen, audio = ctx.settings(LanguageSettings), model.audio
    assert model.speech is not None
    assert audio is not None
    write_card(
        ctx.folder,
        title=f"{language_title(chosen.model)} with a projection for recordings",
        what=f"A speech projection ({model.speech.config.link}) before a frozen causal language model.",
        base=chosen.model,
        example='"Repeat after me: <audio>", audio="speech.mp3"',
        run_id=ctx.tracker.run_id,
        figures={},
        parts={
            "language model": f"{model.language.name} ({model.language.digest})",
            "prompt style": model.language.prompt.style,
            "Whisper": f"{audio.settings.whisper} {audio.digest}".strip(),
            "speech projection": shape_text(model.speech.config),
        },
        lineage={name: result.run_id for name, result in ctx.upstream.items()},
    )


STAGE = Stage(
    name="speech",
    version=2,
    help="train what is between recordings and the frozen language model",
    reads=("speech", "language", "audio"),
    run=run,
    upstream=upstream,
    check=check,
    cost=cost,
    asking=evaluating("speech"),
    then=("evaluate",),
    trains=True,
    talks=True,
)
