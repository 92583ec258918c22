"""Recordings as text: where somebody speaks, what is said there, and when; whichever Whisper listens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mmphi.data.audio import Recording, Samples
from mmphi.models.audio.vad import PAD_S, WINDOW_S, SpeechInterval, detect_speech, merge_intervals


@dataclass(frozen=True)
class Segment:
    """Something said.

    Attributes:
        start: When, in seconds from the begin of the recording.
        end: When it was said.
        text: What.
    """

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class ASRResult:
    """What a Whisper makes of one window.

    Attributes:
        segments: With times from the begin of the window.
        language: Its code, such as ``en``.
    """

    segments: tuple[Segment, ...]
    language: str


@dataclass(frozen=True)
class Transcript:
    """What is said in a recording.

    Attributes:
        segments: In order.
        language: Its code; empty where nobody speaks.
        told: What is not as the recording's file says.
    """

    segments: tuple[Segment, ...] = ()
    language: str = ""
    told: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """All that is said, with single spaces."""
        return self.between(float("-inf"), float("inf"))

    def between(self, start: float, end: float) -> str:
        """What is said from one time to another, in seconds: all segments whose middle lies there."""
        chosen = (s.text for s in self.segments if start <= (s.start + s.end) / 2 <= end)
        return " ".join(" ".join(chosen).split())


class ASRModel(Protocol):
    """A Whisper, as :func:`transcribe` asks it.

    Attributes:
        name: As it was asked for.
        english: Whether it knows no other language.
    """

    name: str
    english: bool

    def hear(self, sounds: Sequence[Samples], languages: Sequence[str], prompt: str = "") -> list[ASRResult]:
        """What is said in windows of at most 30 s, each by itself.

        Args:
            sounds: float32 at 16 kHz.
            languages: Code of each, empty where it is to be found out.
            prompt: What was said before, or how words are spelled.
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
    """What is said in recordings of any length.

    Each is divided at its pauses into windows, and only what the voice gate lets through is heard at all. The language
    of a recording is that of its first window, unless it is given.

    Args:
        asr_model: The ASR model.
        recordings: At 16 kHz.
        language: Code of the language; empty finds it out for every recording.
        prompt: Put before every window.
        threshold: Of the voice gate.
        window: Longest window, in seconds; at most 30.
        batch_size: Windows heard at once.
        check: Called before each batch of windows; what it raises ends this.

    Returns:
        A transcript of each recording; an empty one where nobody speaks.
    """
    parts = [
        merge_intervals(detect_speech(each, threshold=threshold, longest=window), window, pad=PAD_S, end=each.seconds)
        for each in recordings
    ]
    languages = ["en" if asr_model.english else language] * len(recordings)
    found: list[list[Segment]] = [[] for _ in recordings]
    first = [(place, own[0]) for place, own in enumerate(parts) if own]
    later = [(place, part) for place, own in enumerate(parts) for part in own[1:]]
    for group in (first, later):  # The first window of each says in which language the others are heard.
        for begin in range(0, len(group), batch_size):
            check()
            chosen = group[begin : begin + batch_size]
            sounds = [cut_samples(recordings[place], part) for place, part in chosen]
            heard = asr_model.hear(sounds, [languages[place] for place, _ in chosen], prompt)
            for (place, part), what in zip(chosen, heard, strict=True):
                languages[place] = languages[place] or what.language
                found[place] += [
                    Segment(part.start + each.start, min(part.start + each.end, part.end), each.text)
                    for each in what.segments
                ]
    return [
        Transcript(
            tuple(sorted(segments, key=lambda s: s.start)),
            languages[place] if parts[place] else "",
            recordings[place].told,
        )
        for place, segments in enumerate(found)
    ]


def cut_samples(recording: Recording, part: SpeechInterval) -> Samples:
    """The samples of a stretch."""
    return recording.samples[round(part.start * recording.rate) : round(part.end * recording.rate)]
