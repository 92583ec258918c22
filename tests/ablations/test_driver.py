from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
import toy_studies
from mlflow.exceptions import MlflowException
from optuna.trial import TrialState
from toy_studies import STEPS, STUDY, drive, driver, loss, results

from ablations.driver import TrialError
from ablations.finished_trials import FinishedTrials
from ablations.study_run import StudyRun
from ablations.trials import TrialSpec
from ablations.tuning import tuning_of
from mmphi.errors import SettingsError, StoreError
from mmphi.tracking.run_writer import TrackingStore
from reports.study_query import Trial, load_study

pytestmark = pytest.mark.usefixtures("forked_workers")


def expected(seeds: int, layers: dict[str, int] | None = None) -> dict[str, float]:
    """What the judged trials must find: each level at its own best learning rate."""
    best = {1: 1e-2, 2: 1e-3, 3: 1e-3, 4: 1e-3}
    levels = layers or {"one": 1, "two": 2, "three": 3}
    return {
        f"verdict/{level}/{seed}": loss(count, best[count], seed) + 0.01
        for seed in range(seeds)
        for level, count in levels.items()
    }


def judged(found: dict[str, float | None]) -> dict[str, float | None]:
    return {name: value for name, value in found.items() if name.startswith("verdict/")}


def begin(seeds: int, workers: int = 2, **environment: str) -> subprocess.Popen[bytes]:
    """A driver of the toy study in a process of its own."""
    script = [sys.executable, str(Path(toy_studies.__file__)), "drive", str(seeds), str(workers)]
    path = os.pathsep.join([str(Path(toy_studies.__file__).parent), str(Path(__file__).parents[2])])
    merged = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.Popen(script, env=merged, stdout=subprocess.PIPE)


def runs_now() -> list[Trial]:
    return list(load_study(TrackingStore(), "toy").trials)


def test_every_cell_once_each_level_at_its_own_best(empty_store: str) -> None:
    made = driver()
    drive(made)
    assert judged(results(made)) == pytest.approx(expected(3))
    assert made.wanted() == []
    outcomes = made.storages["tuning"].outcomes()
    assert tuning_of(STUDY, "one", outcomes).chosen == {"projector.learning_rate": 1e-2}
    assert tuning_of(STUDY, "three", outcomes).chosen == {"projector.learning_rate": 1e-3}
    data = load_study(TrackingStore(), "toy", ["val/loss"])
    runs = Counter((t.phase, t.level, t.seed, t.params["projector.learning_rate"]) for t in data.trials)
    assert set(runs.values()) == {1}
    assert len(runs) == 6 + 9
    assert data.missing() == []
    # Tags say which cell of which study a run is; the settings are its parameters.
    trial = data.results()["three"][2]
    assert (trial.tags["mmphi.study"], trial.tags["mmphi.factor"]) == ("toy", "projector.layers")
    assert (trial.tags["mmphi.seed"], trial.tags["mmphi.round"]) == ("2", "2")
    assert trial.params["study.level"] == "three"
    assert trial.params["projector.layers"] == "3"
    assert dict(data.curves[trial.run_id])[3] == 3.0 / 4
    # In rounds: when a seed begins, the one before has been begun at all levels.
    order = [t.seed for t in sorted(data.trials, key=lambda t: t.started_ms) if t.phase == "verdict"]
    assert order == sorted(order)
    # Once more: nothing is left to do, and nothing is done.
    drive(driver())
    assert len(load_study(TrackingStore(), "toy").trials) == len(data.trials)


def test_results_with_a_reason(empty_store: str) -> None:
    """NaN and a full memory are results, told once and not tried again; the others go on."""
    study = replace(
        STUDY,
        nuisance={},
        factor="projector.dropout",
        levels={"none": 0.0, "nan": 0.5, "full": 0.25, "no number": 0.125, "infinite": 0.375},
        baseline="none",
    )
    made = driver(replace(study, seeds=2))
    drive(made)
    values = results(made)
    assert values["verdict/nan/1"] is None
    assert values["verdict/none/1"] is not None
    reasons = {o.cell.level: o.reason for o in made.storages["verdict"].outcomes()}
    assert reasons["nan"] == "the loss at step 3 is nan"
    assert reasons["full"].startswith("out of memory")
    assert reasons["no number"] == "test/loss = nan at step 8"
    assert reasons["infinite"] == "test/loss = inf at step 8"
    assert made.wanted() == []
    data = load_study(TrackingStore(), "toy")
    assert data.values("test/loss")["no number"] == data.values("test/loss")["infinite"] == {}
    failed = data.failed()
    assert Counter(t.level for t in failed) == dict.fromkeys(["nan", "full", "no number", "infinite"], 2)
    assert any("the loss at step 3 is nan" in t.reason for t in failed)


def test_worker_that_dies_is_replaced_and_its_trial_asked_again(
    empty_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "die").write_text("once")
    monkeypatch.setenv("TOY_DIE", str(tmp_path / "die"))
    said: list[str] = []
    made = driver(replace(STUDY, nuisance={}, seeds=1, levels={"two": 2, "three": 3}), say=said.append)
    drive(made)
    assert set(results(made)) == {"verdict/two/0", "verdict/three/0"}
    assert any("died by signal 9; asking again" in line for line in said)
    data = load_study(TrackingStore(), "toy")
    assert Counter(t.status for t in data.trials) == {"FINISHED": 2, "KILLED": 1}
    assert data.failed() == []  # The killed one was gone on with.


def test_trial_that_always_kills_its_worker_is_given_up(
    empty_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "die").write_text("always")
    monkeypatch.setenv("TOY_DIE", str(tmp_path / "die"))
    monkeypatch.setattr(toy_studies, "STEP_S", 0.0)
    made = driver(replace(STUDY, nuisance={}, seeds=1, levels={"two": 2, "three": 3}), retries=0)
    drive(made)
    reasons = {o.cell.name: o.reason for o in made.storages["verdict"].outcomes()}
    assert set(reasons) == {"verdict/two/0", "verdict/three/0"}
    assert reasons["verdict/two/0"] == "its worker died by signal 9"


def test_error_that_nobody_foresaw_is_told_and_tried_again(empty_store: str) -> None:
    """The worker lives on; what it said stands in the reason."""
    study = replace(STUDY, nuisance={}, seeds=1, factor="projector.dropout", levels={"none": 0.0, "odd": 0.75})
    said: list[str] = []
    made = driver(replace(study, baseline="none"), retries=1, say=said.append)
    drive(made)
    reasons = {o.cell.level: o.reason for o in made.storages["verdict"].outcomes()}
    assert reasons == {"none": "", "odd": "crashed 2 times, last by ZeroDivisionError: an odd toy"}
    assert sum("asking again" in line for line in said) == 1


@pytest.mark.slow
def test_cells_that_a_dead_driver_left_waiting_or_running_are_run(empty_store: str) -> None:
    study = replace(STUDY, seeds=1)
    made = driver(study)
    tuning, verdict = made.storages["tuning"], made.storages["verdict"]
    first, second = made.wanted()[:2]
    assert tuning.take(first, 0) is not None  # Killed while it ran ...
    tuning.study.enqueue_trial(
        {"level": 0, "seed": 1000}, user_attrs={"cell": asdict(second)}
    )  # ... and before it did.
    drive(driver(study))
    assert judged(results(made)) == pytest.approx(expected(1))
    assert Counter(t.level for t in load_study(TrackingStore(), "toy").trials) == {"one": 3, "two": 3, "three": 3}
    assert verdict.running() == tuning.running() == set()


def test_workers_that_cannot_start_are_no_result(empty_store: str, tmp_path: Path) -> None:
    made = driver(replace(STUDY, nuisance={}, seeds=1))
    script = tmp_path / "broken.py"
    script.write_text("raise ImportError('no such thing')")
    with pytest.raises(StoreError, match=r"no worker can start\n.*worker0\.log"):
        made.run(1, tmp_path / "logs", command=(sys.executable, str(script)))
    assert "no such thing" in (tmp_path / "logs" / "worker0.log").read_text()
    assert results(made) == {}


@pytest.mark.slow
def test_stopped_by_a_signal_it_goes_on_from_there(empty_store: str) -> None:
    """Workers finish their step and end; the run says that it was stopped, and is gone on with."""
    process = begin(1, workers=1, TOY_SLOW="1")
    assert process.stdout is not None
    assert process.stdout.readline() == b"driving\n"
    while not any("val/loss" in t.metrics for t in runs_now()):  # It trains.
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=240)
    assert b"verdict/" not in rest  # The results, which it prints at the end of a study.
    stopped = [t.status for t in runs_now()]
    assert set(stopped) <= {"FINISHED", "KILLED"}
    assert stopped.count("FINISHED") < 9
    made = driver(replace(STUDY, seeds=1))
    drive(made)
    assert judged(results(made)) == pytest.approx(expected(1))


def test_metric_that_no_run_has_is_told(empty_store: str) -> None:
    with pytest.raises(TrialError, match=r"no metric 'test/cider'[\s\S]*test/loss"):
        drive(driver(replace(STUDY, nuisance={}, metric="test/cider")))


@pytest.mark.slow
def test_changes_while_it_runs(empty_store: str) -> None:
    """A level is stopped, one is added, seeds are added: each trial that was finished stays."""
    study = replace(STUDY, seeds=1)
    drive(driver(study))
    before = {t.run_id for t in load_study(TrackingStore(), "toy").trials}
    from ablations.study_cli import studies

    studies(["toy", "--stop", "one"])
    studies(["toy", "--add", "four=4"])
    studies(["toy", "--seeds", "2"])
    made = driver(study)
    drive(made)
    values = judged(results(made))
    assert values == pytest.approx(
        expected(2, {"two": 2, "three": 3, "four": 4}) | {"verdict/one/0": loss(1, 1e-2, 0) + 0.01}
    )
    data = load_study(TrackingStore(), "toy")
    assert before < {t.run_id for t in data.trials}
    assert (data.stopped, data.seeds, data.levels) == (["one"], 2, ["one", "two", "three", "four"])
    assert [c["what"] for c in data.changes] == ["stop", "add", "seeds"]
    for wrong, said in (
        (["--stop", "five"], "there is no level 'five'"),
        (["--stop", "two"], "the baseline"),
        (["--add", "five"], "give it a value"),
        (["--add", "one=7"], "the level 'one' is 1 already"),
        (["--add", "five=99"], "projector.layers"),
        (["--seeds", "0"], "nothing would be run"),
    ):
        with pytest.raises(SettingsError, match=said):
            studies(["toy", *wrong])
    with pytest.raises(SettingsError, match=r"did you mean toy\?"):
        studies(["tou", "--seeds", "3"])


def test_study_begun_as_something_else_is_refused(empty_store: str) -> None:
    driver()
    with pytest.raises(SettingsError, match=r"fixed.projector.steps is 9, was 8[\s\S]*--name toy2"):
        driver(replace(STUDY, fixed={"projector.steps": 9}))
    with pytest.raises(SettingsError, match="seeds is 4, was 3"):
        driver(replace(STUDY, seeds=4))


def test_a_study_goes_on_where_a_setting_was_introduced_since(empty_store: str) -> None:
    declared = STUDY.declaration()
    settings = {name: value for name, value in declared["settings"].items() if name != "vision.quick_gelu"}
    StudyRun.open(TrackingStore(), "toy", declared | {"settings": settings})
    assert StudyRun.open(TrackingStore(), "toy", declared).declaration()["settings"] == settings
    changed = declared | {"settings": {**declared["settings"], "vision.quick_gelu": "yes"}}
    with pytest.raises(SettingsError, match=r"settings\.vision\.quick_gelu is yes, was not there"):
        StudyRun.open(TrackingStore(), "toy", changed)


def test_a_study_resumes_with_its_question_in_other_words(empty_store: str) -> None:
    first = StudyRun.open(TrackingStore(), "toy", STUDY.declaration())
    reworded = replace(STUDY, question="The same question in other words?")
    assert StudyRun.open(TrackingStore(), "toy", reworded.declaration()).run_id == first.run_id


def test_two_drivers_that_begin_at_once_share_one_record(empty_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two machines, where no lock of a file holds: neither sees the other's record at first."""
    first = StudyRun.open(TrackingStore(), "toy", STUDY.declaration())
    find, seen = StudyRun.find, []

    def blind(store: TrackingStore, name: str) -> StudyRun | None:
        seen.append(name)
        return None if len(seen) == 1 else find(store, name)

    monkeypatch.setattr(StudyRun, "find", blind)
    assert StudyRun.open(TrackingStore(), "toy", STUDY.declaration()).run_id == first.run_id
    assert [run.info.run_id for run in TrackingStore().search(study_record="toy")] == [first.run_id]


def test_a_trial_that_another_driver_failed_ends_no_driver(empty_store: str) -> None:
    made = driver(replace(STUDY, nuisance={}))
    storage = made.storages["verdict"]
    taken = [storage.take(cell, 0) for cell in made.wanted()[:2]]
    assert all(taken)
    for trial in taken:
        storage.study.tell(trial.number, state=TrialState.FAIL)
    storage.tell(taken[0], [1.0], "a run")
    storage.fail(taken[1], "its worker died", final=False, died=True)
    assert storage.outcomes() == []
    assert len(made.wanted()) == 9


def test_texts_that_are_tuned_have_no_quotes_in_the_names_of_their_cells() -> None:
    cell = TrialSpec("tuning", "one", 1000, {"projector.optimizer": "muon", "projector.learning_rate": 1e-3})
    assert cell.name == "tuning/one/1000/projector.learning_rate=0.001, projector.optimizer=muon"


def test_second_driver_of_a_study_is_refused(empty_store: str) -> None:
    made = driver()
    with (
        made.storages["verdict"].owned(),
        pytest.raises(StoreError, match="another process"),
        driver().storages["verdict"].owned(),
    ):
        pass


def test_what_another_study_found_is_shown_in_both(empty_store: str) -> None:
    """The same settings are computed once; the second study gets a run of its own with all curves."""
    study = replace(STUDY, nuisance={}, seeds=1, levels={"two": 2, "three": 3})
    drive(driver(study, "first"))
    drive(driver(replace(study, question="Again?", levels={"two": 2, "deep": 3}), "second"))
    first, second = (load_study(TrackingStore(), name, ["val/loss"]) for name in ("first", "second"))
    one, other = first.results()["three"][0], second.results()["deep"][0]
    assert other.tags["mmphi.reuses"] == one.run_id
    assert other.metrics["test/loss"] == one.metrics["test/loss"]
    assert second.curves[other.run_id] == first.curves[one.run_id]
    assert other.params["projector.layers"] == "3"
    assert (
        TrackingStore().is_result(TrackingStore().run(other.run_id)) is False
    )  # It shows a result, and is none itself.


@pytest.mark.slow
def test_killed_repeatedly_the_study_ends_as_if_nothing_had_been(empty_store: str) -> None:
    """Workers and the driver are killed in turn, each while a trial that began since the last kill is running.

    Before that the driver is killed as soon as it drives, and a worker as soon as it is there.
    """
    kills, seeds = int(os.environ.get("MMPHI_KILLS", "5")), 3
    rng = random.Random(0)
    process = begin(seeds)
    assert process.stdout is not None
    assert process.stdout.readline() == b"driving\n"
    process.kill()
    process.wait()
    process = begin(seeds)
    while not (workers := psutil.Process(process.pid).children()):
        time.sleep(0.05)
    workers[0].kill()
    for kill in range(kills):
        before = len(trials_so_far())
        while len(trials_so_far()) <= before:
            assert process.poll() is None, f"the study ended before kill {kill}"
            time.sleep(0.1)
        time.sleep(rng.uniform(0, 0.2))
        workers = psutil.Process(process.pid).children()
        if kill % 2:
            rng.choice(workers).kill()
        else:
            process.kill()
            assert process.wait() == -signal.SIGKILL
            process = begin(seeds)
    assert process.wait(240) == 0
    made = driver(replace(STUDY, seeds=seeds))
    assert judged(results(made)) == pytest.approx(expected(seeds))
    data = load_study(TrackingStore(), "toy")
    assert sum(t.status == "KILLED" for t in data.trials) >= 1
    finished = Counter(
        (t.phase, t.level, t.seed, t.params["projector.learning_rate"]) for t in data.trials if t.finished
    )
    assert set(finished.values()) == {1}
    assert len(finished) == 6 + 3 * seeds
    assert data.missing() == []
    assert data.failed() == []


def trials_so_far() -> list[Trial]:
    """None while the study's record is still being written."""
    try:
        return runs_now()
    except (SettingsError, StoreError):
        return []


def test_record_without_its_declaration(empty_store: str) -> None:
    made = driver()
    folder = TrackingStore().local_folder(TrackingStore().run(made.record.run_id))
    assert folder is not None
    (folder / "study.json").unlink()
    with pytest.raises(StoreError, match=r"has no study.json"):
        load_study(TrackingStore(), "toy")
    record = StudyRun.find(TrackingStore(), "toy")
    assert record is not None
    with pytest.raises(StoreError, match=r"has no study.json"):
        record.declaration()


def test_a_trial_whose_run_was_deleted_is_run_again(empty_store: str) -> None:
    study = replace(STUDY, seeds=2)
    drive(driver(study))
    before = load_study(TrackingStore(), "toy")
    gone = [before.results()["three"][1].run_id, before.results("tuning")["one"][1000].run_id]
    for run_id in gone:
        TrackingStore().client.delete_run(run_id)
    assert load_study(TrackingStore(), "toy").missing() == [("three", 1)]
    made = driver(study)
    assert sorted(cell.level for cell in made.wanted()) == ["one"]  # What is tuned comes first.
    drive(made)
    data = load_study(TrackingStore(), "toy")
    assert data.missing() == made.wanted() == []
    assert judged(results(made)) == pytest.approx(expected(2))
    assert len(data.trials) == len(before.trials)
    assert not set(gone) & {trial.run_id for trial in data.trials}


def test_a_study_that_is_begun_again_after_all_of_it_was_deleted(empty_store: str) -> None:
    drive(driver(replace(STUDY, seeds=1)))
    for run in TrackingStore().client.search_runs([TrackingStore().experiment()]):
        TrackingStore().client.delete_run(run.info.run_id)
    made = driver(replace(STUDY, seeds=1, fixed={"projector.steps": STEPS + 1}))
    assert len(made.wanted()) == 6  # Nothing that was tuned with other settings counts.
    drive(made)
    data = load_study(TrackingStore(), "toy")
    assert data.missing() == []
    assert {t.params["projector.steps"] for t in data.trials} == {str(STEPS + 1)}
    # The same driver once more finds its own trials.
    assert driver(replace(STUDY, seeds=1, fixed={"projector.steps": STEPS + 1})).wanted() == []


def test_trials_of_an_earlier_study_of_the_same_name_are_not_reported(empty_store: str) -> None:
    study = replace(STUDY, seeds=1, nuisance={})
    drive(driver(study))
    record = StudyRun.find(TrackingStore(), "toy")
    assert record is not None
    TrackingStore().client.delete_run(record.run_id)
    made = driver(replace(study, fixed={"projector.steps": STEPS + 1}))
    assert load_study(TrackingStore(), "toy").trials == []
    drive(made)
    assert {t.params["projector.steps"] for t in load_study(TrackingStore(), "toy").trials} == {str(STEPS + 1)}


def test_trials_in_optuna_of_an_earlier_version_are_gone_on_with(empty_store: str) -> None:
    study = replace(STUDY, seeds=1, nuisance={})
    made = driver(study)
    drive(made)
    for storage in made.storages.values():  # As they were: without a note of their record.
        storage.storage.set_study_user_attr(storage.study._study_id, "record", None)
        assert storage.study.user_attrs == {"record": None}
    assert driver(study).wanted() == []


def test_a_study_of_an_earlier_version_without_tuning_is_gone_on_with(empty_store: str) -> None:
    study = replace(STUDY, nuisance={}, tuning_extensions=3, tuning_seeds=(1000, 1001, 1002))
    later = ("tuning_extensions", "looks", "replicate", "replicates", "also")
    earlier = {name: value for name, value in study.declaration().items() if name not in later}
    first = StudyRun.open(TrackingStore(), "toy", earlier | {"tuning_seeds": [1000]})
    assert StudyRun.open(TrackingStore(), "toy", study.declaration()).run_id == first.run_id


def test_an_evaluation_that_the_store_cannot_show_now_is_not_deleted(
    empty_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TrackingStore()

    def away(run_id: str) -> None:
        raise MlflowException("timeout", error_code="TEMPORARILY_UNAVAILABLE")

    monkeypatch.setattr(store.client, "get_run", away)
    with pytest.raises(MlflowException, match="timeout"):
        store.run_if_there("0" * 32)
    monkeypatch.undo()
    assert TrackingStore().run_if_there("0" * 32) is None


def test_deleted_runs_are_looked_for_once(empty_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, store = [], TrackingStore()
    results = FinishedTrials(store, "toy")
    monkeypatch.setattr(store, "search", lambda **tags: looked.append(tags) or iter(()))
    for _ in range(3):
        assert results.gone(["one"]) == {"one"}
        assert results.gone(["two"]) == {"two"}
    assert len(looked) == 2
