"""What is said is put together from windows, in its place and language; and what two Whispers hear is alike."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from sounds import NOISE, SECONDS, chords

from mmphi.data.audio import RATE, Recording, Samples, read_audio
from mmphi.errors import ModelError
from mmphi.models.audio import transcription
from mmphi.models.audio.transcription import ASRResult, Segment, transcribe
from mmphi.models.audio.vad import SpeechInterval
from mmphi.models.audio.whisper_backends import FasterWhisper, OpenAIWhisper

CPU = torch.device("cpu")


class Numbers:
    """Says the first sample of what it hears, and notes in what language it was asked to."""

    name, english = "numbers", False

    def __init__(self) -> None:
        self.asked: list[tuple[int, str, str]] = []

    def transcribe(self, sounds: Sequence[Samples], languages: Sequence[str], prompt: str = "") -> list[ASRResult]:
        self.asked += [(round(float(s[0])), code, prompt) for s, code in zip(sounds, languages, strict=True)]
        return [
            ASRResult((Segment(0.5, 99, str(round(float(s[0])))),), code or ("de" if s[0] < 100 else "en"))
            for s, code in zip(sounds, languages, strict=True)
        ]


def spoken(*numbers: float) -> Recording:
    """A second for each number."""
    return Recording(np.repeat(np.array(numbers, np.float32), RATE), defects=("cut off",) if numbers else ())


@pytest.fixture
def every_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that lets each second through, by itself."""
    monkeypatch.setattr(
        transcription,
        "detect_speech",
        lambda each, **_: [SpeechInterval(i, i + 1) for i in range(len(each.samples) // RATE)],
    )


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_windows_of_many_recordings_find_back_to_their_places(every_second: None, batch_size: int) -> None:
    asr_model = Numbers()
    given = [spoken(1, 2, 3), spoken(), spoken(101), spoken(5, 102)]
    found = transcribe(asr_model, given, window=1, batch_size=batch_size, prompt="so far")
    assert [each.text for each in found] == ["1 2 3", "", "101", "5 102"]
    assert [each.language for each in found] == ["de", "", "en", "de"]
    assert [(s.start, s.end) for s in found[0].segments] == [(0.5, 1), (1.5, 2), (2.5, 3)]  # None past its window.
    assert [each.defects for each in found] == [("cut off",), (), ("cut off",), ("cut off",)]
    asked = {number: code for number, code, _ in asr_model.asked}
    assert asked == {1: "", 101: "", 5: "", 2: "de", 3: "de", 102: "de"}  # The later ones as the first one says.
    assert {prompt for _, _, prompt in asr_model.asked} == {"so far"}


def test_a_language_that_is_given_is_not_looked_for(every_second: None) -> None:
    asr_model = Numbers()
    assert transcribe(asr_model, [spoken(1, 2)], language="fr", window=1)[0].language == "fr"
    assert {code for _, code, _ in asr_model.asked} == {"fr"}


def test_windows_join_what_fits(every_second: None) -> None:
    asr_model = Numbers()
    assert transcribe(asr_model, [spoken(1, 2, 3)], window=2)[0].text == "1 3"
    assert len(asr_model.asked) == 2


def test_an_unknown_size_is_told() -> None:
    with pytest.raises(ModelError, match="there is no Whisper 'tinny'") as caught:
        OpenAIWhisper("tinny", CPU)
    assert "tiny.en" in caught.value.hint


@pytest.mark.slow
def test_doubtful_windows_are_decoded_anew_whatever_stands_beside_them(tiny_whisper: Path) -> None:
    """Random weights are never sure: every window is guessed at several times, in a batch as alone."""
    whisper = OpenAIWhisper(str(tiny_whisper), CPU)
    sounds = [np.random.default_rng(seed).normal(size=RATE).astype(np.float32) for seed in range(3)]
    together = whisper.transcribe(sounds, ["en"] * 3)
    assert len(together) == 3
    assert whisper.transcribe(sounds, ["en"] * 3) == together


def test_frames_are_those_of_the_sound_alone(tiny_whisper: Path) -> None:
    whisper = OpenAIWhisper(str(tiny_whisper), CPU)
    sounds = [np.random.default_rng(n).normal(size=n).astype(np.float32) for n in (RATE, RATE // 4 + 1, 30 * RATE)]
    frames = whisper.encode(sounds)
    torch.testing.assert_close(frames[2], whisper.model.embed_audio(whisper.mel(sounds[2:]))[0], atol=1e-5, rtol=1e-4)
    assert [tuple(each.shape) for each in frames] == [(50, 16), (13, 16), (1500, 16)]
    for sound, each in zip(sounds, frames, strict=True):
        torch.testing.assert_close(whisper.encode([sound])[0], each, atol=1e-5, rtol=1e-4)
    short = whisper.encode(sounds, 5)
    assert [each.shape for each in short] == [each.shape for each in frames]
    for sound, each in zip(sounds, short, strict=True):
        torch.testing.assert_close(whisper.encode([sound], 5)[0], each, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(short[0], frames[0], atol=1e-3)  # Less silence is something else,
    torch.testing.assert_close(short[2], frames[2], atol=1e-5, rtol=1e-4)  # but where there is none to add.


@pytest.fixture(scope="module")
def whisper_tiny() -> OpenAIWhisper:
    import os

    if "MMPHI_MODELS" not in os.environ:
        pytest.skip("MMPHI_MODELS is not set")
    return OpenAIWhisper(os.environ["MMPHI_MODELS"] + "/whisper-tiny.en.pt", CPU)


@pytest.mark.real
def test_a_real_recording(whisper_tiny: OpenAIWhisper, real_folder: Path) -> None:
    recording = read_audio(real_folder / "speech" / "jfk.flac")
    twice = Recording(np.concatenate([recording.samples, np.zeros(3 * RATE, np.float32), recording.samples]))
    one, two, silent = transcribe(whisper_tiny, [recording, twice, Recording(np.zeros(5 * RATE, np.float32))])
    words = "ask not what your country can do for you"
    assert words in one.text.lower().replace(",", "")
    assert two.text.lower().replace(",", "").count(words) == 2
    assert two.segments[-1].start > 14
    assert all(a.end <= b.start + 0.5 for a, b in zip(two.segments, two.segments[1:], strict=False))
    assert (one.language, silent.language, silent.text) == ("en", "", "")


@pytest.mark.real
def test_what_is_no_voice_has_no_words(whisper_tiny: OpenAIWhisper) -> None:
    """Silence, a tone, noise and struck chords, in which this Whisper alone hears words."""
    sounds = [np.zeros(10 * RATE), 0.5 * np.sin(2 * np.pi * 440 * SECONDS), 0.1 * NOISE, chords()]
    found = transcribe(whisper_tiny, [Recording(sound.astype(np.float32)) for sound in sounds])
    assert [each.text for each in found] == [""] * 4
    assert any(heard.segments for heard in whisper_tiny.transcribe([s.astype(np.float32) for s in sounds], ["en"] * 4))


@pytest.mark.real
def test_batched_is_single(whisper_tiny: OpenAIWhisper, real_folder: Path) -> None:
    with (real_folder / "speech" / "transcripts.csv").open() as file:
        rows = list(csv.DictReader(file))[:6]
    name = next(key for key in rows[0] if rows[0][key].endswith(".mp3"))
    recordings = [read_audio(real_folder / "speech" / Path(row[name]).name) for row in rows]
    together = [each.text for each in transcribe(whisper_tiny, recordings, batch_size=6)]
    assert together == [transcribe(whisper_tiny, [each])[0].text for each in recordings]
    assert all(together)


@pytest.mark.real
def test_faster_whisper_hears_the_same(whisper_tiny: OpenAIWhisper, real_models: Path, real_folder: Path) -> None:
    pytest.importorskip("faster_whisper")
    faster = FasterWhisper(str(real_models / "whisper-tiny.en-ct2"), CPU)
    recording = read_audio(real_folder / "speech" / "jfk.flac")
    ours, theirs = (transcribe(each, [recording])[0].text for each in (whisper_tiny, faster))
    assert ours == theirs
