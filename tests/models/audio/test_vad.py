"""What is no voice is not heard as one; what is one is found where it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sounds import NOISE, SECONDS, chords

from mmphi.data.audio import RATE, Recording, read_audio
from mmphi.models.audio.vad import SpeechInterval, detect_speech, merge_intervals


@pytest.mark.parametrize(
    "sound",
    [
        np.zeros(len(SECONDS)),
        0.5 * np.sin(2 * np.pi * 440 * SECONDS),
        0.1 * NOISE,
        0.5 * NOISE,
        np.cumsum(NOISE) * 1e-3,
        chords(),
        np.zeros(100),
    ],
    ids=["silence", "tone", "noise", "loud noise", "brown noise", "chords", "a moment"],
)
def test_what_is_no_voice_is_not_heard_as_one(sound: np.ndarray) -> None:
    assert detect_speech(Recording(sound.astype(np.float32))) == []


def test_another_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="16000 Hz, not 8000 Hz"):
        detect_speech(Recording(np.zeros(8000, np.float32), 8000))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], []),
        ([(0.5, 2), (3, 3.5)], [(0.1, 3.9)]),
        ([(0.3, 2)], [(0, 2.4)]),  # No further than the recording goes,
        ([(10, 19.7)], [(9.85, 19.85)]),  # than there is room in a window,
        ([(1, 8), (8.5, 14), (20, 29.9)], [(0.6, 8.25), (8.25, 14.4), (19.95, 29.95)]),  # or than half of a pause.
    ],
)
def test_windows_have_a_breath_around_them(parts, expected) -> None:
    found = merge_intervals([SpeechInterval(*each) for each in parts], 10, pad=0.4, end=31)
    assert [(pytest.approx(each.start), pytest.approx(each.end)) for each in found] == expected


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], []),
        ([(0, 2), (3, 4), (5, 9)], [(0, 9)]),
        ([(0, 8), (9, 11), (12, 22)], [(0, 8), (9, 11), (12, 22)]),
        ([(1, 5), (6, 11), (12, 13), (14, 20)], [(1, 11), (12, 20)]),
    ],
)
def test_neighbours_are_heard_together_as_long_as_they_fit(parts, expected) -> None:
    found = merge_intervals([SpeechInterval(*each) for each in parts], 10)
    assert found == [SpeechInterval(*each) for each in expected]


@pytest.mark.real
def test_a_voice_is_found_between_silence_and_noise(real_folder: Path) -> None:
    spoken = read_audio(real_folder / "speech" / "jfk.flac").samples
    quiet = np.zeros(5 * RATE, np.float32)
    recording = Recording(np.concatenate([quiet, spoken, quiet, 0.02 * NOISE.astype(np.float32), spoken]))
    parts = detect_speech(recording)
    first = [p for p in parts if p.end < 17]
    second = [p for p in parts if p.start > 30]
    assert len(first) + len(second) == len(parts)
    assert sum(p.seconds for p in first) == pytest.approx(sum(p.seconds for p in second), abs=0.5)
    assert 5 <= first[0].start < 6
    assert [round(w.start) for w in merge_intervals(parts, 20)] == [round(first[0].start), round(second[0].start)]
    assert all(p.seconds <= 2 for p in detect_speech(Recording(spoken), longest=2))
