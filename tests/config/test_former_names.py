"""Settings have one name; presets, commands, keys and stored studies with the names of earlier versions stay valid."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from mmphi.config import messages
from mmphi.config.fields import all_fields, former_names, renamed
from mmphi.config.former_names import FORMER_NAMES
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


def test_sections_are_read_under_former_names() -> None:
    assert ProjectorSettings.model_validate({"whiten": True}).standardize is True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ProjectorSettings.model_validate({"standardize": True}).standardize is True


def test_stored_declarations_of_studies_get_current_names() -> None:
    stored = {"factor": "projector.views", "fixed": {"projector.align_steps": 0}, "seed_settings": ["projector.seed"]}
    assert renamed(stored, FORMER_NAMES) == {
        "factor": "projector.num_augmentations",
        "fixed": {"projector.alignment_steps": 0},
        "seed_settings": ["projector.seed"],
    }
