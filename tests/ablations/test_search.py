from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from optuna.trial import TrialState
from toy_studies import COMMAND, loss

from ablations.paths import logs_folder, search_storage
from ablations.search import Range, Search
from ablations.search_driver import SearchDriver
from ablations.study_cli import studies
from ablations.study_run import StudyRun
from ablations.watch import progress_table
from mmphi.errors import SettingsError
from mmphi.tracking.run_writer import TrackingStore
from reports.commands import report
from reports.study_query import load_study

pytestmark = pytest.mark.usefixtures("forked_workers")

SEARCH = Search(
    question="Which toy?",
    space={"projector.layers": Range(1, 4), "projector.learning_rate": [1e-3, 1e-2]},
    trials=6,
    fixed={"projector.steps": 4},
    sampler="random",
)


def drive(search: Search, name: str = "look") -> SearchDriver:
    store = TrackingStore()
    record = StudyRun.open(store, name, search.declaration())
    made = SearchDriver(search, record, search_storage(store, name, search, ""))
    made.run(1, logs_folder(store, name), command=COMMAND)
    record.finish("FINISHED")
    return made


@pytest.mark.slow
def test_wilcoxon_over_paired_seeds_and_its_report(empty_store: str, tmp_path: Path) -> None:
    search = replace(SEARCH, seeds=(0, 1, 2, 3, 4, 5, 6), trials=5)
    made = drive(search)
    trials = made.storage.trials(TrialState.COMPLETE)
    assert len(trials) == 5
    for trial in trials:
        seeds = trial.user_attrs.get("pruned_after", 7)
        of = [loss(trial.params["projector.layers"], trial.params["projector.learning_rate"], n) for n in range(seeds)]
        assert trial.value == pytest.approx(sum(of) / seeds)
    pruned = [t for t in trials if "pruned_after" in t.user_attrs]
    assert pruned  # Worse at every one of the first seeds: it was ended, and got less than the others.
    assert min(t.values[0] for t in pruned) > min(t.values[0] for t in trials)
    data = load_study(TrackingStore(), "look")
    assert len(data.trials) == sum(t.user_attrs.get("pruned_after", 7) for t in trials)
    assert report(["ablation", "--study", "look", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "**No verdict.**" in text
    assert "budgets differ" in text
    assert f"{5 - len(pruned)} of 5 trials ran to their end." in text
    assert f"ended after {pruned[0].user_attrs['pruned_after']} of 7 seeds" in text
    best = min(trials, key=lambda t: t.value or 9.0)
    assert f"Best of {5 - len(pruned)} whole trials: `projector.layers` = {best.params['projector.layers']}" in text
    assert "trial 0" in progress_table(data)
    with pytest.raises(SettingsError, match="is a search"):
        studies(["look", "--seeds", "3"])


@pytest.mark.slow
@pytest.mark.filterwarnings("error::UserWarning")  # Optuna warns of a step that is reported twice.
def test_hyperband_ends_a_training_by_its_curve(empty_store: str) -> None:
    search = replace(SEARCH, pruner="hyperband", seeds=(0,), trials=4)
    made = drive(search)
    states = [t.state for t in made.storage.trials()]
    assert made.done() == 4
    assert set(states) <= {TrialState.COMPLETE, TrialState.PRUNED}
    reported = made.storage.trials()[0].intermediate_values
    assert reported[2] == 1.0  # The toy's curve: 3 / (step + 1).


@pytest.mark.slow
def test_two_objectives_give_a_front(empty_store: str, tmp_path: Path) -> None:
    search = replace(
        SEARCH,
        objectives={"val/loss": "minimize", "projector/parameters": "minimize"},
        pruner="",
        seeds=(0,),
        sampler="nsga2",
        trials=8,
    )
    made = drive(search)
    report(["ablation", "--study", "look", "--out", str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    shown = text[text.index("(the Pareto front)") : text.index("![Pareto front]")]
    values = {tuple(t.values) for n, t in enumerate(made.storage.trials()) if f"| trial {n} |" in shown}
    assert values == {tuple(t.values) for t in made.storage.study.best_trials}


@pytest.mark.slow
def test_trials_of_a_dead_driver_are_run_again_with_their_settings(empty_store: str) -> None:
    """The total is what was asked for, and nothing is trained twice."""
    search = replace(SEARCH, pruner="", seeds=(0, 1), trials=3)
    store = TrackingStore()
    record = StudyRun.open(store, "look", search.declaration())
    storage = search_storage(store, "look", search, "")
    left = storage.study.ask(search.distributions())  # As a driver leaves it that is killed at once.
    made = drive(search)
    trials = made.storage.trials()
    assert trials[0].state == TrialState.FAIL
    assert trials[0].user_attrs["reason"] == "its driver ended"
    assert trials[1].params == left.params
    assert trials[1].user_attrs["origin"] == 0
    assert [t.state for t in trials[1:]] == [TrialState.COMPLETE] * 3
    data = load_study(store, record.name)
    assert {t.level for t in data.trials} == {"trial 0", "trial 2", "trial 3"}
    assert len({(t.level, t.seed) for t in data.trials if t.finished}) == 6
