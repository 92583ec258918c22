"""What is heard is kept, measured and playable, however often it is interrupted."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile

from mmphi.data.audio import RATE, Samples
from mmphi.errors import DataError, ModelError, SettingsError
from mmphi.models.audio import transcription
from mmphi.models.audio.transcription import ASRResult, Segment
from mmphi.models.audio.vad import SpeechInterval
from mmphi.models.audio.whisper_backends import BACKENDS
from mmphi.pipeline.build import Pipeline
from mmphi.stages import STAGES, load_settings

SAID = {1: "one dog", 2: "two dogs run", 3: "three", 4: "four men"}


class Fake:
    """Says what is written for the loudness of a recording; fails where it is told to."""

    english, heard, fail_at = True, [], 0

    def __init__(self, name: str, *_: object) -> None:
        if name == "gone":
            raise ModelError("there is no Whisper 'gone'", "give another")

    def transcribe(self, sounds: Sequence[Samples], languages: Sequence[str], prompt: str = "") -> list[ASRResult]:
        numbers = [round(float(np.abs(s).max()) * 10) for s in sounds]
        if Fake.fail_at and Fake.fail_at in numbers:
            raise KeyboardInterrupt
        Fake.heard += numbers
        return [ASRResult((Segment(0, 0.5, SAID[n]),), code) for n, code in zip(numbers, languages, strict=True)]


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    Fake.heard, Fake.fail_at = [], 0
    monkeypatch.setitem(BACKENDS, "openai", Fake)
    monkeypatch.setattr(
        transcription,
        "detect_speech",
        lambda each, **_: [SpeechInterval(0, each.seconds)] if np.abs(each.samples).max() > 0.05 else [],
    )


def recordings(folder: Path, rows: Sequence[tuple[str, str]]) -> Path:
    """A CSV, and a second of each number in it as loud as that number says."""
    for name, _ in rows:
        if name[0].isdigit():
            level = int(name[0]) / 10
            wavfile.write(folder / name, RATE, np.full(RATE, level, np.float32))
    with (folder / "spoken.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("audio", "transcript"), *rows])
    return folder / "spoken.csv"


def built(path: Path, **changes: str):
    settings = load_settings("tiny", {"transcribe.path": str(path), **changes}, "transcribe")
    return Pipeline(STAGES).build("transcribe", settings)


def test_errors_are_counted_over_all_words_and_each_recording_can_be_played(empty_store: str, tmp_path: Path) -> None:
    path = recordings(
        tmp_path, [("1.wav", "One dog."), ("2.wav", "Two cats run fast!"), ("0.wav", ""), ("4.wav", "4 men")]
    )
    result = built(path)
    # "cats" is heard as another word, "fast" is not heard; the silent one is silent; numbers are the same word.
    assert result.metrics["transcribe/wer"] == pytest.approx(2 / 8)
    assert result.metrics["transcribe/words"] == 8
    assert result.metrics["transcribe/silent"] == 1
    assert result.metrics["transcribe/seconds"] == pytest.approx(4, abs=0.01)
    assert result.metrics["transcribe/real_time_factor"] > 0
    table = json.loads((result.path / "transcripts.json").read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [(row["audio"], row["heard"], row["wer"]) for row in rows] == [
        ("1.wav", "one dog", 0), ("2.wav", "two dogs run", 0.5), ("0.wav", "", 0), ("4.wav", "four men", 0)
    ]  # fmt: skip
    page = (result.path / "transcripts.html").read_text()
    assert page.count("<audio") == 4
    assert "Two cats run fast!" in page


def test_interrupted_it_hears_only_what_was_not_heard(empty_store: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("mmphi.stages.transcribe.AT_ONCE", 1)
    path = recordings(tmp_path, [(f"{n}.wav", SAID[n]) for n in (1, 2, 3, 4)])
    Fake.fail_at = 3
    with pytest.raises(KeyboardInterrupt):
        built(path)
    assert Fake.heard == [1, 2]
    Fake.fail_at = 0
    assert built(path).metrics["transcribe/wer"] == 0
    assert Fake.heard == [1, 2, 3, 4]


def test_a_line_that_was_cut_off_is_heard_again(tmp_path: Path) -> None:
    from mmphi.stages.transcribe import finished_rows

    lines = tmp_path / "transcripts.jsonl"
    lines.write_text('{"audio": "a", "text": "x"}\n{"audio": "b", "te')
    assert set(finished_rows(lines)) == {"a"}
    assert lines.read_text() == '{"audio": "a", "text": "x"}\n'


def test_what_cannot_be_used_is_counted_and_too_much_of_it_stops(empty_store: str, tmp_path: Path) -> None:
    (tmp_path / "words.wav").write_text("no sound at all, only words " * 20)
    path = recordings(tmp_path, [("1.wav", "one dog"), ("gone.wav", "x"), ("words.wav", "x"), ("../out.wav", "x")])
    with pytest.raises(DataError, match="3 recordings cannot be used") as caught:
        built(path)
    for reason in ("missing", "not audio", "leaves the"):
        assert reason in str(caught.value)
    assert built(path, **{"transcribe.max_bad_share": "0.8"}).metrics["transcribe/recordings"] == 1


def test_a_csv_without_transcripts_has_no_error_rate(empty_store: str, tmp_path: Path) -> None:
    recordings(tmp_path, [("1.wav", "")])
    (tmp_path / "spoken.csv").write_text("audio\n1.wav\n")
    result = built(tmp_path / "spoken.csv")
    assert "transcribe/wer" not in result.metrics
    assert json.loads((result.path / "transcripts.json").read_text())["data"]


def test_what_is_missing_is_told(empty_store: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"transcribe\.path names no recordings"):
        Pipeline(STAGES).build("transcribe", load_settings("tiny", {}, "transcribe"))
    (tmp_path / "spoken.csv").write_text("sound,words\n")
    with pytest.raises(DataError, match="no column 'audio'; it has sound, words"):
        built(tmp_path / "spoken.csv")
    with pytest.raises(ModelError, match="no Whisper 'gone'"):
        built(recordings(tmp_path, [("1.wav", "one dog")]), **{"audio.whisper": "gone"})
