"""``mmphi ablate --dry-run`` and ``--no-tuning``."""

from __future__ import annotations

from dataclasses import replace

import pytest
from toy_studies import STUDY

from ablations.dry_run import lines, missing_upstream, planned_trials, seconds_per_trial, without_tuning
from ablations.smoke import smoke_study
from ablations.study import Study, load
from mmphi.cli import main
from mmphi.errors import SettingsError
from mmphi.tracking.run_writer import TrackingStore

TUNED = replace(STUDY, nuisance={"projector.learning_rate": (1e-3, 1e-2)}, tuning_seeds=(1000, 1001), seeds=3)


def test_every_trial_is_planned_tuning_included() -> None:
    trials = planned_trials(TUNED)
    levels = len(TUNED.levels)
    assert [t.phase for t in trials] == ["tuning"] * (levels * 2 * 2) + ["verdict"] * (levels * 3)
    assert len({t.name for t in trials}) == len(trials)
    assert len(planned_trials(without_tuning(TUNED))) == levels * 3
    with pytest.raises(SettingsError, match="no nuisance settings"):
        without_tuning(replace(TUNED, nuisance={}))


def test_the_time_is_that_of_earlier_trials_or_of_the_stage(empty_store: str) -> None:
    store, study = TrackingStore(empty_store), replace(TUNED, stage="projector", tokens=500)
    assert seconds_per_trial(study, store, "toy") is None
    assert "time: unknown" in lines("toy", study, store, 1)[-1]
    tags = {"mmphi.stage": "projector", "mmphi.key": "k", "mmphi.preset": "tiny"}
    run = store.begin("projector", tags).run_id
    for name, value in {"seconds": 100.0, "projector/supervised_tokens": 1000.0}.items():
        store.client.log_metric(run, name, value)
    store.client.set_terminated(run, "FINISHED")
    found = seconds_per_trial(study, store, "toy")
    assert found is not None
    assert found[0] == pytest.approx(50)
    assert "2 worker(s)" in lines("toy", study, store, 2)[-1]


def test_the_command_trains_nothing(empty_store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", "projector_depth", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    study = load("projector_depth")[1]
    assert isinstance(study, Study)
    assert f"{len(planned_trials(study))} trials:" in shown
    assert shown.count("  verdict  ") == study.seeds * len(study.levels)
    assert list(TrackingStore(empty_store).search()) == []
    assert main(["ablate", "projector_depth", "--dry-run", "--no-tuning"]) == 0
    assert "0 tuning and" in capsys.readouterr().out


def test_what_the_first_trial_builds_is_named(empty_store: str) -> None:
    study = load("projector_depth")[1]
    assert isinstance(study, Study)
    store = TrackingStore()
    assert missing_upstream(study, store) == ["scenes", "pretrain", "light_clip", "embed"]
    changes = {"data.sources": [{"kind": "captions", "path": "nowhere.csv"}]}
    assert missing_upstream(replace(study, fixed={**study.fixed, **changes}), store) == []  # The trial explains it.


@pytest.mark.parametrize("preset", ["tiny smoke", "photos"])
def test_runs_of_other_presets_are_no_measure_of_time(empty_store: str, preset: str) -> None:
    store, study = TrackingStore(empty_store), replace(TUNED, stage="projector", tokens=500)
    tags = {"mmphi.stage": "projector", "mmphi.key": "k", "mmphi.preset": preset}
    run = store.begin("projector", tags).run_id
    for name, value in {"seconds": 100.0, "projector/supervised_tokens": 1000.0}.items():
        store.client.log_metric(run, name, value)
    store.client.set_terminated(run, "FINISHED")
    assert seconds_per_trial(study, store, "toy") is None


def test_a_smoke_study_keeps_its_factor_and_shrinks_the_rest() -> None:
    study = load("projector_depth")[1]
    assert isinstance(study, Study)
    small = smoke_study(study)
    small.check()
    settings = small.settings(small.baseline)
    assert settings.projector.steps <= 4
    assert settings.pretrain.steps <= 4
    assert settings.name == "tiny smoke"
    assert settings.projector.supervised_tokens == 0
    assert small.levels == study.levels
    assert (small.seeds, len(small.tuning_seeds)) == (2, 1)
    assert len(planned_trials(small)) < len(planned_trials(study)) / 3


def test_the_smoke_study_has_a_name_of_its_own(empty_store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", "projector_depth", "--smoke", "--dry-run"]) == 0
    assert f"{2 * len(load('projector_depth')[1].levels)} verdict trials" in capsys.readouterr().out
