"""The section of how recordings are heard."""

from __future__ import annotations

from typing import Literal

from mmphi.config.section import Section, setting

SIZES = (
    *("tiny.en", "tiny", "base.en", "base", "small.en", "small", "medium.en", "medium"),
    *("large-v1", "large-v2", "large-v3", "large", "large-v3-turbo", "turbo"),
)


class AudioSettings(Section):
    """Which Whisper hears recordings, and how."""

    whisper: str = setting("tiny.en", "Whisper's size by name, or the path of its weights", file="name", names=SIZES)
    backend: Literal["openai", "faster"] = setting("openai", "openai-whisper, or faster-whisper where it is installed")
    language: str = setting("", "code of the language, such as de; empty finds it out for every recording")
    prompt: str = setting("", "put before every window: how names are spelled, what was said before")
    vad_threshold: float = setting(
        0.5, "how sure the voice gate must be that somebody speaks", ge=0, le=1, formerly="threshold"
    )
    max_chunk_s: float = setting(30.0, "longest stretch heard at once", unit="seconds", ge=2, le=30, formerly="window")
    pad_multiple_s: float = setting(
        5.0,
        "frames: windows are filled up with silence to a multiple of this; Whisper learned on 30",
        unit="seconds",
        ge=1,
        le=30,
        formerly="fill",
    )
    max_seconds: float = setting(3600.0, "longer recordings are refused by their header", unit="seconds", gt=0)
    beam_size: int = setting(
        5, "guesses at a transcript that are followed at once; 1 is greedy", unit="guesses", ge=1, formerly="beam"
    )
    batch_size: int = setting(8, "windows heard at once", unit="windows", affects_key=False, ge=1)
