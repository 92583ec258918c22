"""Stage ``speech``: trains the audio projector before the frozen language model, by distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mmphi.config import LanguageSettings
from mmphi.config.audio import AudioSettings
from mmphi.config.declared_view import SettingsView
from mmphi.config.speech import SpeechSettings
from mmphi.errors import SettingsError
from mmphi.pipeline.stage import Context, Cost, Stage
from mmphi.stages.shared_models import check_training, evaluating
from mmphi.stages.speech_data import conversations, speech_model

if TYPE_CHECKING:
    from mmphi.models.multimodal import Multimodal


def upstream(settings: SettingsView) -> tuple[str, ...]:
    """``pretrain`` if it provides the language model, and ``listen`` if stored encoder frames are used."""
    chosen, needed = settings(SpeechSettings), []
    if settings(LanguageSettings).model == "pretrain" and not chosen.model:
        needed.append("pretrain")
    if chosen.audio_input == "encoder" and chosen.features == "cached":
        needed.append("listen")
    return tuple(needed)


def check(settings: SettingsView) -> None:
    """Check the recordings, the ``<audio>`` placeholder in the question, the Whisper backend and the batch size.

    Raises:
        SettingsError: If one of them is missing or does not fit the audio input.
    """
    chosen = settings(SpeechSettings)
    check_training("speech", chosen)
    if not chosen.path:
        raise SettingsError(
            "speech.path names no recordings", "give a CSV whose header is audio,transcript: --path recordings.csv"
        )
    if chosen.question.count("<audio>") != 1:
        raise SettingsError(
            "speech.question must contain <audio> exactly once",
            'for example: --question "Repeat after me: <audio>"',
        )
    if chosen.audio_input != "transcript" and settings(AudioSettings).backend != "openai":
        raise SettingsError(
            f"faster-whisper does not support the audio input {chosen.audio_input}",
            "set audio.backend to openai",
        )


def cost(_: SettingsView) -> Cost:
    """Disk space, as a fixed upper estimate: the projector and its optimiser state are small."""
    return Cost(disk_bytes=4 * 4 * 3 * 4096 * 4096)


def run(ctx: Context) -> Mapping[str, float]:
    """Train the audio projector and save a self-contained model."""
    from mmphi.data.schema import ReadReport
    from mmphi.training.audio_projector import train_audio_projector

    chosen, report = ctx.settings(SpeechSettings), ReadReport()
    examples = conversations(ctx, report)
    model = speech_model(ctx)
    figures = train_audio_projector(model, examples, chosen, folder=ctx.folder, tracker=ctx.tracker, report=report)
    if ctx.first:
        model.save_pretrained(ctx.folder)
        _write_card(ctx, model)
    return figures


def _write_card(ctx: Context, model: Multimodal) -> None:
    from mmphi.models.model_card import language_title, shape_text, write_card

    chosen, audio = ctx.settings(LanguageSettings), model.audio
    assert model.speech is not None
    assert audio is not None
    write_card(
        ctx.folder,
        title=f"{language_title(chosen.model)} with a projection for recordings",
        what=f"An audio projector ({model.speech.config.link}) before a frozen causal language model.",
        base=chosen.model,
        example='"Repeat after me: <audio>", audio="speech.mp3"',
        run_id=ctx.tracker.run_id,
        figures={},
        parts={
            "language model": f"{model.language.name} ({model.language.digest})",
            "prompt style": model.language.prompt.style,
            "Whisper": f"{audio.settings.whisper} {audio.digest}".strip(),
            "audio projector": shape_text(model.speech.config),
        },
        lineage={name: result.run_id for name, result in ctx.upstream.items()},
    )


STAGE = Stage(
    name="speech",
    version=2,
    help="train the audio projector before the frozen language model",
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
