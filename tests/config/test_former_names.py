"""Settings have one name; presets, commands, keys and stored studies with the names of earlier versions stay valid."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from mmphi.config import messages
from mmphi.config.fields import all_fields, former_names
from mmphi.config.former_names import (
    FORMER_NAMES,
    current_metric,
    current_metrics,
    former_metric,
    with_current_names,
)
from mmphi.config.projector import ProjectorSettings
from mmphi.pipeline.cache_key import consumed
from mmphi.stages import STAGES, Settings, load_settings

FORMER = former_names(Settings)


@pytest.fixture(autouse=True)
def nothing_warned_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_WARNED", set())


def test_no_setting_has_the_former_name_of_another() -> None:
    assert len(FORMER) > 25
    assert not set(FORMER) & set(all_fields(Settings))
    assert FORMER == FORMER_NAMES
    assert {"projector.whiten", "pretrain.warmup", "qlora.accumulation", "speech.align_steps"} <= set(FORMER)


@pytest.mark.parametrize("former", ["projector.views", "whiten", "projector.align_steps"])
def test_a_command_may_use_former_names(former: str) -> None:
    value = "true" if former == "whiten" else "3"
    with pytest.warns(FutureWarning, match=r"is called projector\.\w+ now"):
        settings = load_settings("tiny", {former: value}, "projector")
    current = FORMER.get(former, "projector.standardize").partition(".")[2]
    assert str(getattr(settings.projector, current)).lower() == value


def test_a_preset_may_use_former_names_and_is_warned_about_once(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("extends: tiny\nprojector:\n  whiten: true\n  warmup: 0.5\n")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        settings = load_settings(str(tmp_path / "own.yaml"))
        load_settings(str(tmp_path / "own.yaml"))
    assert isinstance(settings.projector, ProjectorSettings)
    assert (settings.projector.standardize, settings.projector.warmup_ratio) == (True, 0.5)
    assert len([each for each in seen if each.category is FutureWarning]) == 2
    warnings.simplefilter("ignore")
    (tmp_path / "child.yaml").write_text("extends: own.yaml\nprojector:\n  standardize: false\n")
    assert load_settings(str(tmp_path / "child.yaml")).projector.standardize is False


def test_keys_have_the_names_that_introduced_them() -> None:
    """tests/test_compatibility.py compares the keys themselves."""
    settings = load_settings("tiny", {"projector.warmup_ratio": "0.5", "projector.num_augmentations": "2"})
    names = set(consumed(STAGES["projector"], settings))
    assert {"projector.warmup", "projector.views"} <= names
    assert not names & set(FORMER.values())


def test_items_of_a_list_keep_their_former_name_in_keys() -> None:
    settings = load_settings("tiny", {"evaluate.audio_inputs": '["transcript", "encoder"]', "evaluate.stage": "speech"})
    found = consumed(STAGES["evaluate"], settings)
    assert {name: value for name, value in found.items() if "links" in name or "audio_inputs" in name} == {
        "evaluate.links.0": "transcript",
        "evaluate.links.1": "encoder",
    }
    assert not [name for name in consumed(STAGES["evaluate"], load_settings("tiny")) if "links" in name]
    assert with_current_names({"evaluate.links.0": "soft"}) == {"evaluate.audio_inputs.0": "soft"}
    with pytest.warns(FutureWarning, match=r"is called evaluate\.audio_inputs now"):
        assert load_settings("tiny", {"links": "[soft]"}, "evaluate").evaluate.audio_inputs == ["soft"]


@pytest.mark.parametrize(
    ("former", "current"),
    [
        ("test/ended", "test/eos_rate"),
        ("train/ended/detail", "train/eos_rate/detail"),
        ("val/hearing_gain", "val/audio_gain"),
        ("test/transcript/hearing_gain", "test/transcript/audio_gain"),
    ],
)
def test_metrics_of_earlier_versions_are_read_under_their_current_names(former: str, current: str) -> None:
    assert (current_metric(former), former_metric(current)) == (current, former)
    assert current_metric(current) == current
    assert current_metrics({former: 1.0, "seconds": 2.0}) == {current: 1.0, "seconds": 2.0}
    assert (
        current_metrics({former: 1.0, current: 3.0}) == current_metrics({current: 3.0, former: 1.0}) == {current: 3.0}
    )
    assert with_current_names({"metric": former, "also": {former: "a title"}}) == {
        "metric": current,
        "also": {current: "a title"},
    }


@pytest.mark.parametrize(
    "name", ["test/loss/ended", "ended", "test/ended_early", "test/rouge_l/hearing_gain", "seconds"]
)
def test_other_metrics_and_kinds_of_rows_keep_their_names(name: str) -> None:
    assert current_metric(name) == former_metric(name) == name


def test_sections_are_read_under_former_names() -> None:
    assert ProjectorSettings.model_validate({"whiten": True}).standardize is True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ProjectorSettings.model_validate({"standardize": True}).standardize is True


def test_stored_declarations_of_studies_get_current_names() -> None:
    stored = {"factor": "projector.views", "fixed": {"projector.align_steps": 0}, "seed_settings": ["projector.seed"]}
    assert with_current_names(stored) == {
        "factor": "projector.num_augmentations",
        "fixed": {"projector.alignment_steps": 0},
        "seed_settings": ["projector.seed"],
    }
