from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmphi.config.presets import files_of_settings, presets_folder
from mmphi.errors import SettingsError
from mmphi.stages import load_settings

ENVIRONMENT = {
    "MMPHI_PHOTOS": "photos",
    "MMPHI_MODELS": "models",
    "MMPHI_LLAVA": "llava",
    "MMPHI_COCO": "coco",
    "MMPHI_SPOKEN": "spoken",
}


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
    assert (found.projector.layers, found.vision.pool, found.projector.learning_rate) == (3, 2, 1e-3)
    assert (found.projector.seed, found.pretrain.seed) == (7, 0)
    assert found.projector.norm is True
    assert found.projector.steps == load_settings("tiny").projector.steps
    sources = load_settings("tiny", {"data.sources": '[{"kind": "captions", "path": "x.csv"}]'}).data.sources
    assert sources[0].path == str(Path.cwd() / "x.csv")
    assert load_settings("tiny", {"layers": "2"}, "pretrain").pretrain.layers == 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"layers": "0"}, ["projector.layers = 0", "nearest valid value is 1"]),
        ({"layers": "9"}, ["projector.layers = 9", "nearest valid value is 8"]),
        ({"layers": "two"}, ["projector.layers = two", "a whole number", "the default is 2"]),
        ({"learning_rat": "1"}, ["no setting 'learning_rat'", "learning_rate"]),
        ({"vision.pol": "1"}, ["no setting 'vision.pol'", "vision.pool"]),
        ({"visoin.pool": "1"}, ["no setting 'visoin.pool'", "vision.pool"]),
        ({"vision.cls": "drp"}, ["vision.cls = 'drp'", "did you mean drop?"]),
        ({"pretrain.heads": "7"}, ["heads = 7 does not divide width = 128", "8"]),
        ({"language.precision": "fp61"}, ["language.precision", "fp32"]),
        ({"vision.layer": "-1.5"}, ["vision.layer = -1.5", "nearest valid value is -2"]),
        ({"norm": "perhaps"}, ["projector.norm = perhaps", "the default is false"]),
        ({"pool": "2"}, ["no setting 'pool'", "vision.pool"]),
        ({"data.sources": "[{kind: captionz}]"}, ["data.sources.0.kind", "did you mean captions?"]),
        ({"data.sources": "[{knd: captions}]"}, ["data.sources.0.knd", "kind"]),
        ({"data.sources": "[{kind: captions"}, ["data.sources", "cannot be read"]),
        ({"data.sources.1.kind": "captions"}, ["data.sources.1.kind", "data.sources.0.kind"]),
        ({"data.sources": "[{path: captions.csv}]"}, ["data.sources.0", "a source with path needs a kind"]),
        ({"data": "all"}, ["no setting 'data'", "data.sources"]),
        ({"learning_rate": "0"}, ["projector.learning_rate = 0", "> 0", "the default is 0.001"]),
        ({"projector.warmup_ratio": "1.5"}, ["< 1", "the default is 0.03"]),
    ],
)
def test_mistakes_name_key_value_and_what_is_near(overrides, words):
    with pytest.raises(SettingsError) as caught:
        load_settings("tiny", overrides, "projector")
    for word in words:
        assert word in str(caught.value)


def test_a_misspelled_key_of_a_file_finds_sections_and_extends(tmp_path):
    for line, near in (("extend: tiny", "did you mean extends?"), ("projectors: {}", "did you mean projector?")):
        (tmp_path / "mine.yaml").write_text(line)
        with pytest.raises(SettingsError) as caught:
            load_settings(str(tmp_path / "mine.yaml"))
        assert near in str(caught.value)


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
    monkeypatch.setenv("MMPHI_MODELS", "models")
    with pytest.raises(SettingsError, match="MMPHI_PHOTOS, which is not set") as caught:
        load_settings("photos")
    assert "data.sources.0.path" in caught.value.what
    assert "captions.csv" in caught.value.hint
    monkeypatch.setenv("MMPHI_PHOTOS", "photos")
    (source,) = load_settings("photos").data.sources
    assert source.path == str(Path.cwd() / "photos" / "captions.csv")
    monkeypatch.delenv("MMPHI_PHOTOS")
    assert load_settings("photos", {"data.sources": "[]"}).data.sources == []
    assert load_settings("photos", expand=False).data.sources[0].path == "${MMPHI_PHOTOS}/captions.csv"


def test_paths_are_relative_to_their_file(tmp_path):
    (tmp_path / "captions.csv").touch()
    (tmp_path / "mine.yaml").write_text(
        "extends: tiny\ndata: {sources: [{kind: captions, path: captions.csv, images: ../elsewhere}]}\n"
    )
    (source,) = load_settings(str(tmp_path / "mine.yaml")).data.sources
    assert source.path == str(tmp_path / "captions.csv")
    with pytest.raises(SettingsError, match=r"data.sources.0.images = .*elsewhere: there is no such"):
        files_of_settings(load_settings(str(tmp_path / "mine.yaml")), ["data"])


def test_list_items_and_texts_that_look_like_numbers(tmp_path):
    found = load_settings("tiny", {"data.sources.0.kind": "captions", "data.sources.0.name": "7"})
    assert (found.data.sources[0].kind, found.data.sources[0].name) == ("captions", "7")
    assert load_settings("tiny", {"checkpoint": "400"}, "evaluate").evaluate.checkpoint == "400"
    (tmp_path / "mine.yaml").write_text("extends: tiny\nevaluate.checkpoint: 400\nprojector:\nname: 7\n")
    found = load_settings(str(tmp_path / "mine.yaml"))
    assert (found.evaluate.checkpoint, found.name) == ("400", "7")


def test_names_of_models_are_not_taken_for_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "mine").mkdir()
    assert load_settings("tiny").language.model == "pretrain"
    assert load_settings("tiny", {"language.model": "microsoft/phi-2"}).language.model == "microsoft/phi-2"
    assert load_settings("tiny", {"language.model": "./mine"}).language.model == str(tmp_path / "mine")
    missing = load_settings("tiny", {"language.model": "./other"})
    with pytest.raises(SettingsError, match=r"language.model = .*other: there is no such"):
        files_of_settings(missing, ["language"])
    assert files_of_settings(load_settings("tiny", {"language.model": "./mine"}), ["language"]) == {
        "language.model": tmp_path / "mine"
    }


def test_relative_paths_under_mlflow_run_count_from_its_caller(tmp_path, monkeypatch):
    """`mlflow run` starts its commands in the project's folder, wherever it was called."""
    caller, project = tmp_path / "caller", tmp_path / "project"
    caller.mkdir(), project.mkdir()
    (caller / "text.txt").touch()
    code = (
        "import os, sys; os.chdir(sys.argv[1]); from mmphi.stages import load_settings;"
        "print(load_settings('tiny', {'corpus': '[text.txt]'}).corpus.sources[0].path)"
    )
    command = [sys.executable, "-c", code, str(project)]
    shell = ["sh", "-c", 'cd "$0" && "$@"; true', str(caller), *command]
    under = subprocess.run(shell, env={**os.environ, "MLFLOW_RUN_ID": "1"}, capture_output=True, text=True)
    assert under.stdout.strip() == str(caller / "text.txt"), under.stderr
    plain = subprocess.run(shell, capture_output=True, text=True)
    assert plain.stdout.strip() == str(project / "text.txt")


def test_presets_are_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_settings("tiny").name == "tiny"
    (tmp_path / "own.yaml").write_text("extends: tiny\n")
    assert load_settings("own.yaml").name == "own"
