"""Loads a study from the tracking store: its study run, trials and curves. Loads no model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mmphi.config.former_names import current_metric, current_metrics, former_metric, with_current_names
from mmphi.config.messages import did_you_mean
from mmphi.errors import SettingsError, StoreError
from mmphi.tracking.run_tracker import params_of

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

    from mmphi.tracking.run_store import RunStore

CURVE_POINTS = 3
FINAL = ("TrainingError", "MemoryError", "OutOfMemoryError", "out of memory")  # Prefixes of final failures' reasons.
NOT_FINITE = "mmphi.not_finite"
JUDGED = "mmphi.judged_by"  # Tag of a trial: id of the evaluation run with its judged metric.
STUDY_RUN = "mmphi.study_run"  # Tag of a trial: id of its study run.
RECORD, CHANGE, DECLARATION = "study_record", "mmphi.change.", "study.json"


def not_finite(tags: Mapping[str, str], metric: str) -> str:
    """Entry of a run's tags about a NaN or infinite value of a metric; empty if there is none.

    Such values are not logged as metrics (:meth:`mmphi.tracking.run_tracker.RunTracker.metrics`), so without this check
    an earlier finite value of the metric would be used as the result.
    """
    entries = tags.get(NOT_FINITE, "").split("; ")
    return next((entry for entry in entries if current_metric(entry.partition(" = ")[0]) == metric), "")


@dataclass(frozen=True)
class Trial:
    """One MLflow run of a study's trial.

    Attributes:
        run_id: Id of the MLflow run.
        phase: ``tuning``, ``verdict`` or ``search``.
        level: Level of the factor.
        seed: Index of the paired seed.
        status: Status of the MLflow run.
        reason: Why there is no result.
        metrics: Last value of each metric.
        params: Settings by dotted name.
        tags: Tags of the MLflow run.
        started_ms: Start time, in milliseconds since 1970.
    """

    run_id: str
    phase: str
    level: str
    seed: int
    status: str
    reason: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    started_ms: int = 0

    @property
    def running(self) -> bool:
        """Whether the run has not ended."""
        return self.status in ("RUNNING", "SCHEDULED")

    @property
    def finished(self) -> bool:
        """Whether the run is finished."""
        return self.status == "FINISHED"

    def has(self, metric: str) -> bool:
        """Whether the run is finished with a finite value of a metric."""
        return self.finished and metric in self.metrics and not not_finite(self.tags, metric)

    @property
    def went_on(self) -> bool:
        """Whether another run resumed this one after it was interrupted."""
        return "mmphi.continued_by" in self.tags


@dataclass(frozen=True)
class StudyData:
    """A study in the tracking store.

    Attributes:
        name: Name of the study in the store.
        run_id: Id of the study run.
        experiment: Id of the MLflow experiment.
        declaration: Declaration with which the study was started.
        changes: Changes made while the study ran, in order.
        trials: Runs of all trials, oldest first.
        tags: Tags of the study run, such as commit and machine.
        curves: Steps and values of the metric ``curve``, by run id.
        curve: Name of the metric of ``curves``.
        address: Base URL of the MLflow server.
        status: Status of the study run; ``FINISHED`` after its driver ran all trials.
    """

    name: str
    run_id: str
    experiment: str
    declaration: Mapping[str, Any]
    changes: Sequence[Mapping[str, Any]] = ()
    trials: Sequence[Trial] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    curve: str = ""
    address: str = "http://127.0.0.1:5000"
    status: str = "FINISHED"

    @property
    def levels(self) -> list[str]:
        """Declared and added levels in order, including stopped ones."""
        added = [c["name"] for c in self.changes if c["what"] == "add"]
        return list(dict.fromkeys([*self.declaration.get("levels", {}), *added]))

    @property
    def stopped(self) -> list[str]:
        """Stopped levels that were not added again."""
        state: dict[str, str] = {c["name"]: c["what"] for c in self.changes if c["what"] in ("stop", "add")}
        return [level for level, what in state.items() if what == "stop"]

    @property
    def seeds(self) -> int:
        """Current number of seeds."""
        numbers = [int(c["value"]) for c in self.changes if c["what"] == "seeds"]
        return numbers[-1] if numbers else int(self.declaration["seeds"])

    @property
    def planned(self) -> int:
        """Number of seeds declared before the first result; further seeds are exploratory."""
        return int(self.declaration["seeds"])

    @property
    def looks(self) -> list[int]:
        """Numbers of seeds at which the study is judged, including the final one."""
        return [*map(int, self.declaration.get("looks", [])), self.planned]

    def draw(self) -> Callable[[int], int] | None:
        """Function from a seed to its draw, if the study limits the number of draws; ``None`` otherwise."""
        draws = int(self.declaration.get("replicates", 0)) if self.declaration.get("replicate") else 0
        return (lambda number: number % draws) if draws else None

    def lost(self) -> dict[str, set[int]]:
        """Seeds whose run ended without a value, because it diverged or ran out of memory, by level.

        After the driver finished the study, these include all seeds without a result, because the driver repeats
        interrupted trials until they end. Before that, only seeds whose run records a final failure count.
        """
        metric = self.declaration.get("metric", "")
        there = self.results("verdict", metric)
        found: dict[str, set[int]] = {level: set() for level in self.levels}
        if self.status == "FINISHED":
            for level, number in self.missing():
                found[level].add(number)
        running = {(t.level, t.seed) for t in self.trials if t.running}
        for trial in self.failed():
            known = trial.phase == "verdict" and trial.level in found and trial.seed not in there[trial.level]
            final = trial.reason.startswith(FINAL) or bool(not_finite(trial.tags, metric))
            if known and final and (trial.level, trial.seed) not in running:
                found[trial.level].add(trial.seed)
        return found

    def ended(self, level: str) -> int:
        """Number of leading seeds at which a level's trial has ended, with or without a value."""
        there = set(self.results("verdict", self.declaration["metric"])[level]) | self.lost()[level]
        return next(n for n in itertools.count() if n not in there)

    def results(self, phase: str = "verdict", metric: str = "") -> dict[str, dict[int, Trial]]:
        """Finished trials of a phase that have a metric, by level and seed; the oldest run of each."""
        found: dict[str, dict[int, Trial]] = {level: {} for level in self.levels}
        for trial in self.trials:
            if trial.phase == phase and (trial.has(metric) if metric else trial.finished):
                found.setdefault(trial.level, {}).setdefault(trial.seed, trial)
        return found

    def values(self, metric: str) -> dict[str, dict[int, float]]:
        """Values of a metric of the verdict trials, by level and seed."""
        results = self.results("verdict", metric)
        return {level: {n: t.metrics[metric] for n, t in sorted(of.items())} for level, of in results.items()}

    def missing(self) -> list[tuple[str, int]]:
        """Level and seed of the verdict trials without a result; stopped levels are left out."""
        there = self.results("verdict", self.declaration["metric"])
        going = [level for level in self.levels if level not in self.stopped]
        return [(level, n) for level in going for n in range(self.seeds) if n not in there[level]]

    def failed(self) -> list[Trial]:
        """Failed or killed runs that no other run resumed, and finished verdict runs whose metric is not finite."""
        metric = self.declaration.get("metric", "")
        ended = [t for t in self.trials if t.status in ("FAILED", "KILLED") and not t.went_on]
        without = [(t, not_finite(t.tags, metric)) for t in self.trials if t.finished and t.phase == "verdict"]
        return ended + [replace(trial, reason=reason) for trial, reason in without if reason]

    def link(self, run_id: str) -> str:
        """URL of a run in MLflow."""
        return f"{self.address}/#/experiments/{self.experiment}/runs/{run_id}"


def training_curve(history: Sequence[Metric]) -> list[tuple[int, float]]:
    """Steps and values of a metric, without the final value that a stage logs at its end, which has no step."""
    last = max((m.timestamp for m in history if m.step), default=None)
    return sorted((m.step, m.value) for m in history if m.step or last is None or m.timestamp < last)


def _curve(store: RunStore, run_id: str, metric: str) -> list[tuple[int, float]]:
    """Curve of a metric, which earlier versions may have recorded under another name."""
    names = dict.fromkeys((metric, former_metric(metric)))
    return next((c for name in names if (c := training_curve(store.client.get_metric_history(run_id, name)))), [])


def load_study(store: RunStore, name: str, curves: Sequence[str] = ()) -> StudyData:
    """Load a study from the store.

    Args:
        store: Tracking store.
        name: Name of the study.
        curves: Metrics to load as curves, in order of preference; the first with :data:`CURVE_POINTS` values in a run
            is used, else the one with the most values.

    Raises:
        SettingsError: If the store has no study of this name; the message suggests existing names.
        StoreError: If the study run has no declaration.
    """
    record = next(store.search(**{RECORD: name}), None)
    if record is None:
        there = study_names(store)
        near = did_you_mean(name, there)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(there)}" if there else f"mmphi ablate {name}"
        raise SettingsError(f"{store.uri} has no study {name!r}", hint)
    declaration = store.json_of(record, DECLARATION)
    if not declaration:
        raise StoreError(f"run {record.info.run_id} of the study {name} has no {DECLARATION}", "restore its artifacts")
    runs = sorted(_trials(store, name, str(record.info.run_id)), key=lambda trial: (trial.started_ms, trial.run_id))
    judged = [trial.run_id for trial in runs if trial.finished and trial.phase == "verdict"]
    points: dict[str, list[tuple[int, float]]] = {}
    drawn, most = "", -1
    for metric in curves:
        of_run = {run_id: _curve(store, run_id, metric) for run_id in judged}
        measured = min(CURVE_POINTS, max(map(len, of_run.values()), default=0))
        if measured > most:
            drawn, points, most = metric, of_run, measured
    tags = record.data.tags
    base = store.pages
    return StudyData(
        name=name,
        run_id=str(record.info.run_id),
        experiment=str(record.info.experiment_id),
        declaration=with_current_names(declaration),
        changes=[with_current_names(json.loads(tags[t])) for t in sorted(tags) if t.startswith(CHANGE)],
        trials=runs,
        tags=tags,
        curves=points,
        curve=drawn,
        address=base.rstrip("/"),
        status=str(record.info.status),
    )


def _trials(store: RunStore, name: str, record: str) -> Iterator[Trial]:
    """Trials of a study, without those of an earlier study of the same name whose study run was deleted."""
    for run in store.search(study=name):
        if run.info.lifecycle_stage == "active" and run.data.tags.get(STUDY_RUN, record) == record:
            yield _judged(store, trial_of(run))


def _judged(store: RunStore, trial: Trial) -> Trial:
    """A trial with the metrics of the evaluation that its study requested.

    The trial's run holds the values of the latest evaluation of each metric, and the same model may have been evaluated
    again with other settings. Trials of earlier versions have no tag with their evaluation.
    """
    if JUDGED not in trial.tags:
        return trial
    evaluation = store.run_if_there(trial.tags[JUDGED])
    if evaluation is None or evaluation.info.lifecycle_stage != "active":
        return replace(trial, metrics={}, reason=f"its evaluation, run {trial.tags[JUDGED]}, was deleted")
    tags = {name: value for name, value in trial.tags.items() if name != NOT_FINITE}
    own = {NOT_FINITE: evaluation.data.tags[NOT_FINITE]} if NOT_FINITE in evaluation.data.tags else {}
    return replace(trial, metrics={**trial.metrics, **current_metrics(evaluation.data.metrics)}, tags=tags | own)


def trial_of(run: Run) -> Trial:
    """Convert an MLflow run to a trial."""
    tags = run.data.tags
    return Trial(
        run_id=str(run.info.run_id),
        phase=tags.get("mmphi.phase", "verdict"),
        level=tags.get("mmphi.level", ""),
        seed=int(tags.get("mmphi.round", "0")),
        status=str(run.info.status),
        reason=tags.get("mmphi.error", ""),
        metrics=current_metrics(run.data.metrics),
        params=with_current_names(params_of(run)),
        tags=tags,
        started_ms=int(run.info.start_time or 0),
    )


def study_names(store: RunStore) -> list[str]:
    """Sorted names of the studies in the store."""
    experiments = [str(e.experiment_id) for e in store.client.search_experiments()]
    found = store.client.search_runs(experiments, f"tags.`mmphi.{RECORD}` != ''", max_results=1000)
    return sorted({run.data.tags[f"mmphi.{RECORD}"] for run in found})
