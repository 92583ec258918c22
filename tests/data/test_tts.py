"""Sentences are read aloud once, in voices that a seed decides, and none that is held out is among them."""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path
from typing import Any

import pytest
from builders import unavailable

from mmphi.cli import main
from mmphi.data import tts as module
from mmphi.data.audio import read_audio
from mmphi.data.tts import assign_voices, synthesize_sentences

SENTENCES = ["A dog runs .", "Two cats", "A man sings", "A red ball", "Snow", "The  sea"]


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """An espeak-ng that writes down what it reads; what it was asked."""
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command)
        if "cats" in command[-1] and "silent" in command[-1]:
            return subprocess.CompletedProcess(command, 1, "", "no such voice")
        Path(command[command.index("-w") + 1]).write_text(command[-1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module.shutil, "which", lambda _: "espeak-ng")
    monkeypatch.setattr(module.subprocess, "run", run)
    return asked


def captions(folder: Path, texts: list[str] = SENTENCES) -> Path:
    path = folder / "captions.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *((f"{i}.jpg", text) for i, text in enumerate(texts))])
    return path


def real(folder: Path) -> Path:
    folder.mkdir()
    rows = [("a.mp3", "5.jpg", "Waves"), ("b.mp3", "9.jpg", "Snow"), *((f"{n}.mp3", "", f"x {n}") for n in range(5))]
    for name, *_ in rows:
        (folder / name).write_text(name)
    with (folder / "clips.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("audio", "image", "transcript"), *rows])
    return folder / "clips.csv"


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "spoken.csv").open() as file:
        return list(csv.DictReader(file))


def test_what_is_kept_apart_is_not_read_aloud(tmp_path: Path, spoken: list[list[str]]) -> None:
    out = tmp_path / "out"
    assert main(["say", str(captions(tmp_path)), str(out), "--apart", str(real(tmp_path / "real"))]) == 0
    found = rows(out)
    read = [row for row in found if row["split"] == "train"]
    assert {row["transcript"] for row in read} == {"A dog runs .", "Two cats", "A man sings", "A red ball"}
    assert all((out / row["audio"]).read_text() == row["transcript"] for row in read)
    others = [row for row in found if row["split"] != "train"]
    assert [row["split"] for row in others] == ["validation", "test", "test", "test", "test", "validation", "test"]
    said = [(out / row["audio"]).read_text() for row in others]
    assert said == ["a.mp3", "b.mp3", *(f"{n}.mp3" for n in range(5))]


def test_a_second_call_reads_only_what_is_missing(tmp_path: Path, spoken: list[list[str]]) -> None:
    path = captions(tmp_path)
    assert synthesize_sentences(path, tmp_path / "out", column="caption", count=3, seed=1) == 3
    first = rows(tmp_path / "out")
    (tmp_path / "out" / first[1]["audio"]).unlink()
    before = len(spoken)
    synthesize_sentences(path, tmp_path / "out", column="caption", count=3, seed=1)
    assert len(spoken) - before == 1
    assert rows(tmp_path / "out") == first


def test_recordings_of_other_sentences_and_other_files_of_one_name_are_kept_apart(
    tmp_path: Path, spoken: list[list[str]]
) -> None:
    for texts in (SENTENCES, [f"{text} again" for text in SENTENCES], ["Snow", "Snow"]):
        synthesize_sentences(captions(tmp_path, texts), tmp_path / "out", column="caption", count=0, seed=1)
        assert all((tmp_path / "out" / row["audio"]).read_text() == row["transcript"] for row in rows(tmp_path / "out"))
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "a.mp3").write_text(f"recording {number}")
    (tmp_path / "clips.csv").write_text("audio,transcript\n1/a.mp3,recording 1\n2/a.mp3,recording 2\n")
    synthesize_sentences(
        captions(tmp_path), tmp_path / "out", column="caption", count=0, seed=1, apart=tmp_path / "clips.csv"
    )
    for row in rows(tmp_path / "out"):
        assert (tmp_path / "out" / row["audio"]).read_text() == row["transcript"]


def test_voices_differ_and_are_the_seeds() -> None:
    one, two = assign_voices(SENTENCES * 20, 0), assign_voices(SENTENCES * 20, 1)
    assert assign_voices(SENTENCES * 20, 0) == one != two
    assert len({each.voice for each in one}) > 30
    assert all(130 <= each.speed <= 200 and 30 <= each.pitch <= 70 for each in one)
    assert one[5].text == "The sea"
    assert {each.voice for each in assign_voices(SENTENCES, 0, ["en-us"], ["", "+f5"])} == {"en-us", "en-us+f5"}


def test_voices_can_be_chosen(tmp_path: Path, spoken: list[list[str]]) -> None:
    out = str(tmp_path / "out")
    assert main(["tts", str(captions(tmp_path)), out, "--accents", "en-gb", "--voices", ",+m1"]) == 0
    assert {command[2] for command in spoken} == {"en-gb", "en-gb+m1"}


def test_questions_of_conversations_keep_their_answers(tmp_path: Path, spoken: list[list[str]]) -> None:
    lines = ['{"context": "a b", "turns": [["is it red?", "no"], ["what is it?", "a dog"]]}', '{"turns": [["", "x"]]}']
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    assert main(["tts", str(tmp_path / "corpus.jsonl"), str(tmp_path / "out")]) == 0
    found = {row["transcript"]: (row["answer"], row["context"], row["split"]) for row in rows(tmp_path / "out")}
    assert found == {"is it red?": ("no", "a b", ""), "what is it?": ("a dog", "a b", "")}
    (tmp_path / "corpus.jsonl").write_text("[]")
    assert main(["tts", str(tmp_path / "corpus.jsonl"), str(tmp_path / "out")]) == 2


@pytest.mark.parametrize(
    ("texts", "column", "message"),
    [
        (["two cats silent"], "caption", "cannot read 'two cats silent': no such voice"),
        (SENTENCES, "sentence", "has no column 'sentence'\n  it has image, caption"),
    ],
)
def test_what_cannot_be_read_is_told(
    tmp_path: Path, spoken: list[list[str]], capsys: Any, texts: list[str], column: str, message: str
) -> None:
    assert main(["tts", str(captions(tmp_path, texts)), str(tmp_path / "out"), "--column", column]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "spoken.csv").exists()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("transcript\nhello\n", "row 1: the column audio is missing or empty"),
        ("audio,transcript\nnone.wav,hello\n", "row 1: there is no file none.wav"),
    ],
)
def test_recordings_to_hold_out_are_checked_before_synthesis(
    tmp_path: Path, spoken: list[list[str]], capsys: Any, table: str, message: str
) -> None:
    (tmp_path / "real.csv").write_text(table)
    arguments = [
        "tts",
        str(captions(tmp_path, SENTENCES)),
        str(tmp_path / "out"),
        "--apart",
        str(tmp_path / "real.csv"),
    ]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not spoken


def test_without_the_program_it_says_where_to_get_it(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda _: None)
    assert main(["tts", str(captions(tmp_path)), str(tmp_path / "out")]) == 2
    assert "apt install espeak-ng" in capsys.readouterr().err


@pytest.mark.speech
def test_espeak_itself_speaks_each_sentence_for_as_long_as_it_is(tmp_path: Path) -> None:
    """Longer sentences take longer; the files are those that ``spoken.csv`` lists."""
    if module.shutil.which("espeak-ng") is None:
        unavailable("espeak-ng is not installed")
    sentences = ["Snow .", "A brown dog runs over a wide green field and jumps into the cold water ."]
    synthesize_sentences(captions(tmp_path, sentences), tmp_path / "out", column="caption", count=2, seed=0)
    with (tmp_path / "out" / "spoken.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    seconds = {row["transcript"]: read_audio(tmp_path / "out" / row["audio"]).seconds for row in rows}
    assert set(seconds) == set(sentences)
    assert 0.2 < seconds[sentences[0]] < 2.5
    assert 2.5 < seconds[sentences[1]] < 15
