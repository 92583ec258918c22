"""A Whisper, and what it has heard: recordings decoded, gated and transcribed once in a process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmphi.data.audio import Recording, read_audio
from mmphi.data.records import AudioRef
from mmphi.errors import ModelError
from mmphi.models.hearing import Listener, Transcript, transcribe
from mmphi.models.voice import PAD_S, Part, speech, windows
from mmphi.models.whispers import BACKENDS, OpenAIWhisper
from mmphi.settings.audio import AudioSettings


@dataclass(frozen=True)
class Audio:
    """Which Whisper a model hears with.

    Attributes:
        settings: How it hears.
        digest: Of the weights that the speech projection was trained with; empty where any will do.
    """

    settings: AudioSettings
    digest: str = ""


class Ears:
    """A Whisper, and what it has heard in this process: every recording is decoded, gated and transcribed once.

    Args:
        listener: Who hears.
        settings: How.
    """

    def __init__(self, listener: Listener, settings: AudioSettings) -> None:
        self.listener, self.settings = listener, settings
        self._heard: dict[str, Transcript] = {}

    def recording(self, audio: AudioRef) -> Recording:
        """A recording, decoded.

        Raises:
            AudioError: If it cannot be.
        """
        return read_audio(audio.source, max_seconds=self.settings.max_seconds)

    def transcripts(self, recordings: Sequence[AudioRef]) -> list[Transcript]:
        """What is said in recordings.

        Raises:
            AudioError: If one cannot be decoded.
        """
        fresh = [a for a in {identity(a): a for a in recordings}.values() if identity(a) not in self._heard]
        chosen = self.settings
        for first in range(0, len(fresh), chosen.batch_size):
            some = fresh[first : first + chosen.batch_size]
            heard = transcribe(
                self.listener,
                [self.recording(audio) for audio in some],
                language=chosen.language,
                prompt=chosen.prompt,
                threshold=chosen.threshold,
                window=chosen.window,
                batch_size=chosen.batch_size,
            )
            self._heard.update({identity(audio): what for audio, what in zip(some, heard, strict=True)})
        return [self._heard[identity(audio)] for audio in recordings]

    def parts(self, recording: Recording) -> list[Part]:
        """The stretches that are heard at once, silence left out."""
        longest = self.settings.window
        spoken = speech(recording, threshold=self.settings.threshold, longest=longest)
        return windows(spoken, longest, pad=PAD_S, end=recording.seconds)


def identity(audio: AudioRef) -> str:
    """What tells a recording from others in one process."""
    if isinstance(audio.source, bytes):
        return hashlib.sha256(audio.source).hexdigest()
    return str(audio.source)


Once = Callable[[str, str, Callable[[], Any]], Any]


def listener_of(settings: AudioSettings, device: torch.device, once: Once) -> Listener:
    """A Whisper that this process may have already.

    Args:
        settings: Which.
        device: Where it goes.
        once: ``Resources.once``.

    Raises:
        ModelError: If it cannot be had.
    """

    def load() -> Listener:
        return BACKENDS[settings.backend](settings.whisper, device, settings.beam)

    listener: Listener = once("whisper", f"{settings.backend}/{settings.whisper}/{settings.beam}/{device}", load)
    return listener


def ears_of(settings: AudioSettings, device: torch.device, once: Once) -> Ears:
    """A Whisper with what it has heard in this process.

    Args:
        settings: Which, and how it hears.
        device: Where it goes.
        once: ``Resources.once``.

    Raises:
        ModelError: If it cannot be had.
    """
    listener = listener_of(settings, device, once)
    ears: Ears = once("ears", f"{settings.model_dump_json()}/{device}", lambda: Ears(listener, settings))
    return ears


def openai_of(ears: Ears, link: str) -> OpenAIWhisper:
    """The openai-whisper that gives a link what it needs.

    Raises:
        ModelError: If it is another one.
    """
    if not isinstance(ears.listener, OpenAIWhisper):
        raise ModelError(f"faster-whisper does not give what the link {link} needs", "set audio.backend to openai")
    return ears.listener
