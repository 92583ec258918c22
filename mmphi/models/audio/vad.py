"""Where somebody speaks: a gate before Whisper, which hears words in silence, tones and noise."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from mmphi.data.audio import RATE, Recording

WINDOW_S = 30.0  # What Whisper hears at once.
PAD_S = 0.4  # Of silence around speech, as faster-whisper has it; 60 clips had 5.8 % of words wrong with, 6.7 without.


_SILERO = threading.Lock()  # The model has a state, which threads must not share.


@dataclass(frozen=True)
class SpeechInterval:
    """A stretch of a recording, in seconds from its begin.

    Attributes:
        start: Where it begins.
        end: Where it ends.
    """

    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end - self.start


@cache
def _silero() -> Any:
    """Silero's model (MIT), as its package brings it; loaded once a process."""
    from silero_vad import load_silero_vad

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; the package has no other form without onnxruntime.
        return load_silero_vad()


def detect_speech(recording: Recording, *, threshold: float = 0.5, longest: float = WINDOW_S) -> list[SpeechInterval]:
    """Where somebody speaks, by Silero's voice activity detection.

    Args:
        recording: At 16 kHz.
        threshold: How sure of it the detector must be, 0 to 1.
        longest: Longer speech is divided at its longest pause, in seconds.

    Returns:
        Stretches in order, none longer than ``longest``; none where nobody speaks.

    Raises:
        ValueError: If the recording has another rate.
    """
    from silero_vad import get_speech_timestamps

    if recording.rate != RATE:
        raise ValueError(f"the gate hears {RATE} samples a second, not {recording.rate}")
    with _SILERO, torch.inference_mode():
        model = _silero()
        model.reset_states()
        found = get_speech_timestamps(
            torch.from_numpy(recording.samples), model, threshold=threshold, max_speech_duration_s=longest
        )
    return [SpeechInterval(each["start"] / RATE, each["end"] / RATE) for each in found]


def merge_intervals(
    parts: Sequence[SpeechInterval], longest: float = WINDOW_S, *, pad: float = 0.0, end: float = float("inf")
) -> list[SpeechInterval]:
    """Stretches that are heard at once: neighbours with the pause between them, as long as they fit.

    Whisper says better what it hears whole: a sentence with its pauses, not its pieces, and a breath before and after.

    Args:
        parts: In order, none longer than ``longest``.
        longest: Of a window, in seconds.
        pad: Seconds more on both sides, as far as there is sound, no other window, and room in this one.
        end: Of the recording.
    """
    joined: list[SpeechInterval] = []
    for part in parts:
        if joined and part.end - joined[-1].start <= longest:
            joined[-1] = SpeechInterval(joined[-1].start, part.end)
        else:
            joined.append(part)
    padded = []
    for place, part in enumerate(joined):
        room = min(pad, max(0.0, longest - part.seconds) / 2)
        before = part.start - (joined[place - 1].end + part.start) / 2 if place else part.start
        after = (joined[place + 1].start - part.end) / 2 if place + 1 < len(joined) else end - part.end
        padded.append(SpeechInterval(part.start - min(room, before), part.end + max(0.0, min(room, after))))
    return padded
