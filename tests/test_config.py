from __future__ import annotations

from pathlib import Path

import pytest

from mmphi.config import load_settings, presets_folder
from mmphi.errors import SettingsError

ENVIRONMENT = {"MMPHI_PHOTOS": "photos", "MMPHI_MODELS": "models", "MMPHI_LLAVA": "llava", "MMPHI_COCO": "coco"}


@pytest.mark.parametrize("path", sorted(presets_folder().glob("*.yaml")), ids=lambda p: p.stem)
def test_every_preset_is_valid(path: Path, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    assert load_settings(path.stem).name == path.stem


def test_extends_changes_one_field(tmp_path):
    (tmp_path / "deep.yaml").write_text("extends: tiny\nprojector: {layers: 3}\n")
    (tmp_path / "deeper.yaml").write_text("extends: deep\nprojector: {layers: 4}\nname: mine\n")
    tiny, deep, deeper = (
        load_settings(n) for n in ("tiny", str(tmp_path / "deep.yaml"), str(tmp_path / "deeper.yaml"))
    )
    assert (deep.name, deeper.name) == ("deep", "mine")
    assert deeper.projector.layers == 4
    assert deep.projector.model_copy(update={"layers": tiny.projector.layers}) == tiny.projector
    assert deep.pretrain == tiny.pretrain


def test_extending_oneself_is_told(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b\n")
    (tmp_path / "b.yaml").write_text("extends: a\n")
    with pytest.raises(SettingsError, match="extends itself"):
        load_settings(str(tmp_path / "a.yaml"))


def test_command_line_overrides():
    found = load_settings(
        "tiny",
        {"layers": "3", "vision.pool": "2", "learning-rate": "1e-3", "seed": "7", "steps": "preset", "norm": "true"},
        "projector",
    )
    assert (found.projector.layers, found.vision.pool, found.projector.learning_rate, found.seed) == (3, 2, 1e-3, 7)
    assert found.projector.norm is True
    assert found.projector.steps == load_settings("tiny").projector.steps
    sources = load_settings("tiny", {"data.sources": '[{"kind": "captions", "path": "x.csv"}]'}).data.sources
    assert sources[0].path == "x.csv"
    assert load_settings("tiny", {"layers": "2"}, "pretrain").pretrain.layers == 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"layers": "0"}, ["projector.layers = 0", "nearest valid value is 1"]),
        ({"layers": "9"}, ["projector.layers = 9", "nearest valid value is 8"]),
        ({"layers": "two"}, ["projector.layers = 'two'", "integer"]),
        ({"learning_rat": "1"}, ["no setting 'learning_rat'", "learning_rate"]),
        ({"vision.pol": "1"}, ["no setting 'vision.pol'", "vision.pool"]),
        ({"visoin.pool": "1"}, ["no setting 'visoin.pool'", "vision.pool"]),
        ({"vision.cls": "drp"}, ["vision.cls = 'drp'", "nearest valid value is drop"]),
        ({"pretrain.heads": "7"}, ["heads = 7 does not divide width = 128", "8"]),
        ({"language.precision": "fp61"}, ["language.precision", "fp32"]),
        ({"learning_rate": "0"}, ["projector.learning_rate = 0", "more than 0"]),
    ],
)
def test_mistakes_name_key_value_and_what_is_near(overrides, words):
    with pytest.raises(SettingsError) as caught:
        load_settings("tiny", overrides, "projector")
    for word in words:
        assert word in str(caught.value)


def test_files_that_are_no_settings(tmp_path):
    for content, words in (("a: [", "cannot be read"), ("- 1", "holds a list"), ("extends: nothing", "no preset")):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(SettingsError, match=words):
            load_settings(str(tmp_path / "bad.yaml"))
    with pytest.raises(SettingsError, match="no preset 'tinny'") as caught:
        load_settings("tinny")
    assert "tiny" in caught.value.hint


def test_environment_variables_in_paths(monkeypatch):
    monkeypatch.delenv("MMPHI_PHOTOS", raising=False)
    with pytest.raises(SettingsError, match="MMPHI_PHOTOS, which is not set"):
        load_settings("photos")


def test_paths_are_relative_to_their_file(tmp_path):
    (tmp_path / "captions.csv").touch()
    (tmp_path / "mine.yaml").write_text(
        "extends: tiny\ndata: {sources: [{kind: captions, path: captions.csv, images: ../elsewhere}]}\n"
    )
    (source,) = load_settings(str(tmp_path / "mine.yaml")).data.sources
    assert source.path == str(tmp_path / "captions.csv")
