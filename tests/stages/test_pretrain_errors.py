"""What is wrong with a pretraining's texts or settings is said before time is lost on it."""

from __future__ import annotations

import json

import pytest
import texts
from builders import Recorder

from mmphi.config.declared_view import SettingsView
from mmphi.errors import DataError, SettingsError, TrainingError
from mmphi.pipeline.stage import Result
from mmphi.stages import load_settings, pretrain, tokens
from mmphi.training import pretrain_callback


@pytest.fixture(scope="module")
def read(tmp_path_factory) -> Result:
    return texts.read_few(tmp_path_factory.mktemp("corpus"))


def test_a_first_loss_that_cannot_be_is_told(tmp_path, read, monkeypatch):
    monkeypatch.setattr(pretrain_callback, "INITIAL_TOLERANCE", -1.0)
    with pytest.raises(TrainingError, match=r"ln 300 = 5\.704"):
        texts.pretrained(tmp_path, read, texts.settings("text.txt"))


def test_what_was_not_read_is_told(tmp_path):
    good = texts.write_text(tmp_path / "good.txt", 1200)
    (tmp_path / "bad.txt").write_bytes(bytes(range(256)))
    recorder = Recorder()
    with pytest.raises(DataError, match=r"bad\.txt has no text"):
        texts.tokenised(tmp_path / "one", texts.settings(str(good), str(tmp_path / "bad.txt")), recorder)
    assert any("binary" in line for line in recorder.said)
    with pytest.raises(DataError, match="held out"):
        texts.tokenised(tmp_path / "two", texts.settings(str(good), corpus={"validation_share": 1e-9}))


def checked(*sources: str, **changes: str) -> None:
    written = json.dumps(list(sources))
    chosen = load_settings("tiny", {"corpus.sources": written, **changes}, "pretrain")
    for stage in (tokens.STAGE, pretrain.STAGE):
        stage.check(SettingsView(chosen, stage.declared))


def test_settings_that_cannot_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = str(texts.write_text(tmp_path / "a.txt", 100))
    checked(text)
    with pytest.raises(SettingsError, match="not a valid condition") as caught:
        checked(text, stop="when done")
    assert "initial-1" in caught.value.hint
    with pytest.raises(SettingsError, match="cannot be spread evenly over 3") as caught:
        checked(text, gradient_accumulation_steps="3")
    assert "7680" in caught.value.hint
    with pytest.raises(SettingsError, match="no multiple of context"):
        checked(text, batch_tokens="1000")
    with pytest.raises(SettingsError, match="two sources are called"):
        checked(text, text)
    with pytest.raises(SettingsError, match="has no weight"):
        load_settings("tiny", {"corpus.sources": json.dumps([{"path": text, "weight": 1.0}, {"path": "b.txt"}])})
    (tmp_path / "books").mkdir()
    texts.write_text(tmp_path / "books" / "b.txt", 100)
    checked("books")  # A folder that is there is one, however it is written.
    with pytest.raises(SettingsError, match="no text sources are set"):
        tokens.STAGE.check(SettingsView(load_settings("tiny"), tokens.STAGE.declared))
