"""Shared by the audio stages: conversations about recordings, and models with each kind of audio input."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, Any, Literal

from mmphi.config.audio import AudioSettings
from mmphi.config.speech import SpeechSettings
from mmphi.errors import ModelError
from mmphi.pipeline.stage import Context
from mmphi.stages.listen import recordings_of
from mmphi.stages.shared_models import language_of

if TYPE_CHECKING:
    from mmphi.data.schema import AudioRef, Example, ReadReport
    from mmphi.models.audio.audio_features import AudioFeatureSource
    from mmphi.models.audio.audio_projector import Link
    from mmphi.models.audio.transcriber import Audio
    from mmphi.models.language.language_model import LanguageModel
    from mmphi.models.multimodal import Multimodal


def conversations(ctx: Context, report: ReadReport) -> list[Example]:
    """Returns one conversation per recording: the configured question, and the answer or transcript.

    Raises:
        DataError: If no training example is left.
    """
    from mmphi.data.speech_dataset import spoken_examples

    chosen = ctx.settings(SpeechSettings)
    shape: dict[str, Any] = {"validation": chosen.validation, "test": chosen.test, "seed": chosen.split_seed}
    return spoken_examples(recordings_of(chosen, report), report, question=chosen.question, **shape)


def speech_model(ctx: Context) -> Multimodal:
    """A frozen model with a newly initialised audio projector."""
    import torch

    from mmphi.models.audio.audio_projector import AudioProjector, AudioProjectorConfig
    from mmphi.models.checkpoint import load_checkpoint
    from mmphi.models.multimodal import Multimodal

    chosen = ctx.settings(SpeechSettings)
    if chosen.model:
        base = load_checkpoint(ctx.models["speech.model"], once=ctx.resources.once)
    else:
        own = "pretrain" in ctx.upstream
        base = Multimodal(language_of(ctx), None, None, chosen.max_length, own_language=own)
    audio_source, audio = source_for(ctx, base.language, chosen.audio_input)
    torch.manual_seed(chosen.seed)
    stack = chosen.stack_factor if chosen.audio_input == "encoder" else 1
    config = AudioProjectorConfig(
        chosen.audio_input, audio_source.width, base.language.width, chosen.width, stack, chosen.soft_temperature
    )
    speech = AudioProjector(config, scale=float(base.language.embeddings().square().mean().sqrt()))
    return base.with_parts(audio_source=audio_source, speech=speech, audio=audio, questions=())


def untranscribed_source(ctx: Context, language: LanguageModel, link: Link) -> AudioFeatureSource:
    """Feature source of an audio input, with an empty transcript cache."""
    from mmphi.models.audio.audio_features import (
        EncoderFeatures,
        SoftTranscriptFeatures,
        TranscriptFeatures,
        live_encoder_frames,
    )
    from mmphi.models.audio.transcriber import CachedTranscriber, asr_model_of, openai_whisper_of
    from mmphi.models.device import this_device

    chosen, settings = ctx.settings(SpeechSettings), ctx.settings(AudioSettings)
    transcriber = CachedTranscriber(asr_model_of(settings, this_device(), ctx.resources.once), settings)
    if link == "encoder":
        return EncoderFeatures(
            live_encoder_frames(transcriber), openai_whisper_of(transcriber, link).width, chosen.stack_factor
        )
    return (
        TranscriptFeatures(language, transcriber)
        if link == "transcript"
        else SoftTranscriptFeatures(language, transcriber, chosen.soft_temperature)
    )


def source_for(ctx: Context, language: LanguageModel, link: Link) -> tuple[AudioFeatureSource, Audio]:
    """Feature source of an audio input, from stored frames where available, and the Whisper it requires."""
    from mmphi.data.content_hash import FileDigests
    from mmphi.data.ragged_features import RaggedStore
    from mmphi.models.audio.audio_features import (
        EncoderFeatures,
        SoftTranscriptFeatures,
        TranscriptFeatures,
        live_encoder_frames,
        stored_encoder_frames,
    )
    from mmphi.models.audio.transcriber import Audio, openai_whisper_of, transcriber_of
    from mmphi.models.device import this_device

    chosen, settings = ctx.settings(SpeechSettings), ctx.settings(AudioSettings)
    transcriber = transcriber_of(settings, this_device(), ctx.resources.once)
    if link == "transcript":
        return TranscriptFeatures(language, transcriber), Audio(settings)
    if link == "soft":
        temperature = chosen.soft_temperature
        whose = f"{settings.model_dump_json()}/{language.digest}/{temperature}"  # It keeps computed features.
        return ctx.resources.once(
            "soft", whose, lambda: SoftTranscriptFeatures(language, transcriber, temperature, inf)
        ), Audio(settings)
    whisper = openai_whisper_of(transcriber, "encoder")
    frames: Callable[[AudioRef], Any] = live_encoder_frames(transcriber, inf)
    if "listen" in ctx.upstream:
        listened = ctx.upstream["listen"]
        store = ctx.resources.once("frames", listened.run_id, lambda: RaggedStore(listened.path))
        frames = stored_encoder_frames(store, FileDigests())
    return EncoderFeatures(frames, whisper.width, chosen.stack_factor), Audio(settings, whisper.digest)


def with_audio_input(ctx: Context, model: Multimodal, link: Link | Literal[""]) -> Multimodal:
    """Returns a trained model with an audio input: its own with the trained projector, or another without one.

    Args:
        ctx: Context of the stage.
        model: The trained model.
        link: Audio input; empty takes the one that the model was trained with.

    Raises:
        ModelError: If ``link`` is ``encoder`` and the model was not trained with it.
    """
    own = model.speech.config.link if model.speech is not None else "transcript"
    if link in ("", own):
        if own == "encoder" and "listen" not in ctx.upstream:
            return model
        audio_source, audio = source_for(ctx, model.language, own)
        return model.with_parts(audio_source=audio_source, audio=model.audio or audio, questions=())
    if link == "encoder":
        raise ModelError(
            f"the model was trained for the audio input {own} and cannot use encoder frames",
            "train it: --speech.audio_input encoder",
        )
    audio_source, audio = source_for(ctx, model.language, "soft" if link == "soft" else "transcript")
    return model.with_parts(audio_source=audio_source, speech=None, audio=audio, questions=())
