"""The section of speech recognition."""

from __future__ import annotations

from typing import Literal

from mmphi.config.section import Section, setting

SIZES = (
    *("tiny.en", "tiny", "base.en", "base", "small.en", "small", "medium.en", "medium"),
    *("large-v1", "large-v2", "large-v3", "large", "large-v3-turbo", "turbo"),
)


class AudioSettings(Section):
    """Whisper model and its decoding settings."""

    whisper: str = setting("tiny.en", "Whisper's size by name, or the path of its weights", file="name", names=SIZES)
    backend: Literal["openai", "faster"] = setting("openai", "openai-whisper, or faster-whisper where it is installed")
    language: str = setting("", "code of the language, such as de; empty detects it for every recording")
    prompt: str = setting("", "text put before every chunk, such as the spelling of names")
    vad_threshold: float = setting(
        0.5,
        "speech probability above which the voice activity detection keeps a frame",
        ge=0,
        le=1,
        formerly="threshold",
    )
    max_chunk_s: float = setting(
        30.0, "longest chunk that is transcribed at once", unit="seconds", ge=2, le=30, formerly="window"
    )
    pad_multiple_s: float = setting(
        5.0,
        "encoder frames: chunks are padded with silence to a multiple of this; Whisper was trained on 30",
        unit="seconds",
        ge=1,
        le=30,
        formerly="fill",
    )
    max_seconds: float = setting(3600.0, "longer recordings are refused by their header", unit="seconds", gt=0)
    beam_size: int = setting(5, "hypotheses of beam search; 1 is greedy", unit="hypotheses", ge=1, formerly="beam")
    batch_size: int = setting(8, "chunks transcribed at once", unit="chunks", affects_key=False, ge=1)
