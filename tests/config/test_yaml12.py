"""Settings in YAML mean what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mmphi.config import yaml12
from mmphi.errors import SettingsError
from mmphi.stages import Settings, load_settings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("true", True), ("False", False), ("null", None), ("~", None),
        ("010", 10), ("0123456", 123456), ("0o17", 15), ("0x1F", 31), ("1:30", "1:30"), ("1_000", "1_000"),
        ("1e-3", 1e-3), ("1.5", 1.5), (".5", 0.5), ("1e3", 1000.0), ("-.inf", float("-inf")),
        ("2024-07-26", "2024-07-26"),
        ("", None), ("'no'", "no"), ("[1, no]", [1, "no"]), ("{a: 010}", {"a": 10}),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, expected: Any) -> None:
    found = yaml12.plain_values(yaml12.load(text))
    assert found == expected
    assert type(found) is type(expected)


def test_numbers_keep_their_text_and_keys_stand_once() -> None:
    assert yaml12.load("0123456").text == "0123456"
    assert yaml12.load("1e3").text == "1e3"
    with pytest.raises(yaml.YAMLError, match="'a' stands twice"):
        yaml12.load("a: 1\nb: 2\na: 3")
    assert yaml12.load("base: &x {a: 1}\nmine:\n  <<: *x\n  b: 2")["mine"] == {"a": 1, "b": 2}


def preset(folder: Path, text: str, name: str = "own.yaml") -> Settings:
    (folder / name).write_text(text)
    return load_settings(str(folder / name))


def test_presets_say_what_they_mean(tmp_path: Path) -> None:
    found = preset(
        tmp_path,
        "extends: tiny\nprojector: {compile: no, steps: 010}\nlanguage: {revision: 0123456}\nvision: {revision: 1e3}",
    )
    assert (found.projector.compile, found.projector.steps) == ("no", 10)
    assert (found.language.revision, found.vision.revision) == ("0123456", "1e3")
    with pytest.raises(SettingsError, match="'projector' stands twice"):
        preset(tmp_path, "extends: tiny\nprojector: {steps: 10}\nprojector: {width: 64}")


def test_null_is_what_is_inherited(tmp_path: Path) -> None:
    inherited = load_settings("tiny")
    found = preset(tmp_path, "extends: tiny\nprojector:\n  steps: null\n  width:\nvision: null\ndata: {sources: null}")
    assert found.projector == inherited.projector
    assert (found.vision, found.data) == (inherited.vision, inherited.data)
    assert load_settings("tiny").data == inherited.data
    with pytest.raises(SettingsError, match=r"data\.sources\.0 is empty"):
        preset(tmp_path, "extends: tiny\ndata: {sources: [null]}")


def test_a_list_of_one_item_is_typed_as_the_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book #2.txt").write_text("a text")
    found = load_settings("tiny", {"corpus": "book #2.txt"})
    assert [Path(source.path).name for source in found.corpus.sources] == ["book #2.txt"]
    with pytest.raises(SettingsError, match="names nothing"):
        load_settings("tiny", {"corpus": " "})
    assert load_settings("tiny", {"vision.mean": "[0.5, 0.5, 0.5]"}).vision.mean == [0.5, 0.5, 0.5]
    assert load_settings("tiny", {"corpus": "[]"}).corpus.sources == []
