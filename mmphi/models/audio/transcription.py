"""Transcription of recordings of any length with any Whisper backend: VAD, windows, segments with times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mmphi.data.audio import Recording, Samples
from mmphi.models.audio.vad import PAD_S, WINDOW_S, SpeechInterval, detect_speech, merge_intervals


@dataclass(frozen=True)
class Segment:
    """Transcribed segment.

    Attributes:
        start: Start time, in seconds from the beginning of the recording.
        end: End time, likewise.
        text: Transcribed text.
    """

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class ASRResult:
    """Output of an ASR model for one window.

    Attributes:
        segments: Segments with times from the beginning of the window.
        language: Language code, such as ``en``.
    """

    segments: tuple[Segment, ...]
    language: str


@dataclass(frozen=True)
class Transcript:
    """Transcript of a recording.

    Attributes:
        segments: Segments in order.
        language: Language code; empty without speech.
        defects: Defects of the recording's file, one sentence each.
    """

    segments: tuple[Segment, ...] = ()
    language: str = ""
    defects: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Whole text, with single spaces."""
        return self.between(float("-inf"), float("inf"))

    def between(self, start: float, end: float) -> str:
        """Text of the segments whose midpoint is between two times, in seconds."""
        chosen = (s.text for s in self.segments if start <= (s.start + s.end) / 2 <= end)
        return " ".join(" ".join(chosen).split())


class ASRModel(Protocol):
    """Interface of an ASR model for :func:`transcribe`.

    Attributes:
        name: Name or path that it was loaded by.
        english: Whether it is English-only.
    """

    name: str
    english: bool

    def transcribe(self, sounds: Sequence[Samples], languages: Sequence[str], prompt: str = "") -> list[ASRResult]:
        """Transcribe windows of at most 30 s, independently of each other.

        Args:
            sounds: Windows, float32 at 16 kHz.
            languages: Language code of each window; empty detects it.
            prompt: Preceding text, or spellings of words.
        """


def transcribe(
    asr_model: ASRModel,
    recordings: Sequence[Recording],
    *,
    language: str = "",
    prompt: str = "",
    threshold: float = 0.5,
    window: float = WINDOW_S,
    batch_size: int = 8,
    check: Callable[[], None] = lambda: None,
) -> list[Transcript]:
    """Transcribe recordings of any length.

    Only intervals in which VAD finds speech are transcribed, in windows that begin and end at pauses. Unless given, the
    language of a recording is that of its first window.

    Args:
        asr_model: The ASR model.
        recordings: Recordings at 16 kHz.
        language: Language code; empty detects the language of every recording.
        prompt: Text put before every window.
        threshold: Speech probability from which VAD counts a frame as speech, 0 to 1.
        window: Longest window, in seconds; at most 30.
        batch_size: Windows transcribed at once.
        check: Called before each batch of windows; an exception it raises ends the transcription.

    Returns:
        A transcript of each recording; an empty one without speech.
    """
    parts = [
        merge_intervals(detect_speech(each, threshold=threshold, longest=window), window, pad=PAD_S, end=each.seconds)
        for each in recordings
    ]
    languages = ["en" if asr_model.english else language] * len(recordings)
    found: list[list[Segment]] = [[] for _ in recordings]
    first = [(place, own[0]) for place, own in enumerate(parts) if own]
    later = [(place, part) for place, own in enumerate(parts) for part in own[1:]]
    for group in (first, later):  # The first window of a recording determines the language of the others.
        for begin in range(0, len(group), batch_size):
            check()
            chosen = group[begin : begin + batch_size]
            sounds = [cut_samples(recordings[place], part) for place, part in chosen]
            results = asr_model.transcribe(sounds, [languages[place] for place, _ in chosen], prompt)
            for (place, part), what in zip(chosen, results, strict=True):
                languages[place] = languages[place] or what.language
                found[place] += [
                    Segment(part.start + each.start, min(part.start + each.end, part.end), each.text)
                    for each in what.segments
                ]
    return [
        Transcript(
            tuple(sorted(segments, key=lambda s: s.start)),
            languages[place] if parts[place] else "",
            recordings[place].defects,
        )
        for place, segments in enumerate(found)
    ]


def cut_samples(recording: Recording, part: SpeechInterval) -> Samples:
    """Samples of an interval."""
    return recording.samples[round(part.start * recording.rate) : round(part.end * recording.rate)]
