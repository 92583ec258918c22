from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile

from mmphi.benchmarks import transcribe as benchmark
from mmphi.data.audio import RATE
from mmphi.models.audio import transcription
from mmphi.models.audio.transcription import ASRResult, Segment
from mmphi.models.audio.vad import SpeechInterval
from mmphi.models.audio.whisper_backends import BACKENDS

pytestmark = pytest.mark.slow


class Says:
    """The same words of everything."""

    english, name = True, "says"

    def __init__(self, *_: object) -> None:
        pass

    def transcribe(self, sounds, languages, prompt=""):
        return [ASRResult((Segment(0, 0.5, "one dog"),), "en") for _ in sounds]


def test_a_side_hears_all_and_is_measured_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "openai", Says)
    monkeypatch.setattr(transcription, "detect_speech", lambda each, **_: [SpeechInterval(0, each.seconds)])
    for name in ("a", "b", "c"):
        wavfile.write(tmp_path / f"{name}.wav", RATE, np.zeros(RATE, np.float32))
    (tmp_path / "spoken.csv").write_text("audio,transcript\na.wav,one dog\nb.wav,one cat\nc.wav,no\n")
    found = benchmark.run_side("openai", "any", tmp_path / "spoken.csv", 2)
    assert found["texts"] == ["one dog"] * 2
    assert found["wer"] == pytest.approx(1 / 4)
    assert found["words"] == 4
    assert found["seconds"] == pytest.approx(2, abs=0.01)
    assert found["real_time_factor"] > 0


def test_it_prints_sides_and_ratios(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def side(name: str, *_: object) -> dict:
        factor = {"openai": 0.3, "faster": 0.1}[name]
        return {"texts": ["a", name], "wer": 0.05, "real_time_factor": factor, "memory_gb": 1.0}

    monkeypatch.setattr(benchmark, "in_process", side)
    assert benchmark.main(["--path", "spoken.csv"]) == 0
    said = capsys.readouterr().out
    assert "3.00x" in said
    assert "1 of 2 recordings" in said
