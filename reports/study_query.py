"""What the tracking store says of a study: its record, its trials, their curves. Loads no model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mmphi.config.fields import renamed
from mmphi.config.former_names import FORMER_NAMES
from mmphi.config.messages import did_you_mean
from mmphi.errors import SettingsError, StoreError
from mmphi.tracking.run_tracker import params_of

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

    from mmphi.tracking.run_store import RunStore

CURVE_POINTS = 3
FINAL = ("TrainingError", "MemoryError", "OutOfMemoryError", "out of memory")  # Reasons that are results themselves.
NOT_FINITE = "mmphi.not_finite"
JUDGED = "mmphi.judged_by"  # Tag of a trial: the run of the evaluation that its study asked for.
STUDY_RUN = "mmphi.study_run"  # Tag of a trial: the run of its study's record.
RECORD, CHANGE, DECLARATION = "study_record", "mmphi.change.", "study.json"


def not_finite(tags: Mapping[str, str], metric: str) -> str:
    """What a run's tags say about values of a metric that were NaN or infinite; empty where none was.

    Such values are no metrics of the run (:meth:`mmphi.tracking.run_tracker.RunTracker.metrics`), so that an earlier
    finite value of the same metric would be taken for the result.
    """
    entries = tags.get(NOT_FINITE, "").split("; ")
    return next((entry for entry in entries if entry.startswith(f"{metric} = ")), "")


@dataclass(frozen=True)
class Trial:
    """One run of a study.

    Attributes:
        run_id: The run.
        phase: ``tuning``, ``verdict`` or ``search``.
        level: Of the factor.
        seed: Its number among the paired seeds.
        status: MLflow's.
        reason: Why there is no result.
        metrics: The last value of each.
        params: Settings by dotted name.
        tags: All of them.
        started_ms: When, since 1970.
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
        """Whether it has not ended."""
        return self.status in ("RUNNING", "SCHEDULED")

    @property
    def finished(self) -> bool:
        """Whether it has a result."""
        return self.status == "FINISHED"

    def has(self, metric: str) -> bool:
        """Whether it has a result of a metric that can be compared."""
        return self.finished and metric in self.metrics and not not_finite(self.tags, metric)

    @property
    def went_on(self) -> bool:
        """Whether another run went on from it after it was killed."""
        return "mmphi.continued_by" in self.tags


@dataclass(frozen=True)
class StudyData:
    """A study as the store has it.

    Attributes:
        name: In the store.
        run_id: Of its record.
        experiment: Id of the experiment it is in.
        declaration: What it was begun as.
        changes: What was changed while it ran, in order.
        trials: All of its runs, oldest first.
        tags: Of its record: commit, machine.
        curves: Values of a metric by step, by run id.
        curve: That metric.
        address: Of MLflow's pages.
        status: Of its record: whether a driver saw its end.
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
        """All levels that it has or had, in order."""
        added = [c["name"] for c in self.changes if c["what"] == "add"]
        return list(dict.fromkeys([*self.declaration.get("levels", {}), *added]))

    @property
    def stopped(self) -> list[str]:
        """Levels that were stopped and not added again."""
        state: dict[str, str] = {c["name"]: c["what"] for c in self.changes if c["what"] in ("stop", "add")}
        return [level for level, what in state.items() if what == "stop"]

    @property
    def seeds(self) -> int:
        """How many seeds are asked for now."""
        numbers = [int(c["value"]) for c in self.changes if c["what"] == "seeds"]
        return numbers[-1] if numbers else int(self.declaration["seeds"])

    @property
    def planned(self) -> int:
        """How many seeds were declared before the first result; more are exploratory."""
        return int(self.declaration["seeds"])

    @property
    def looks(self) -> list[int]:
        """Numbers of seeds at which the study is judged, the last one included."""
        return [*map(int, self.declaration.get("looks", [])), self.planned]

    def draw(self) -> Callable[[int], int] | None:
        """The draw that a seed was built on, where a study has fewer draws than seeds."""
        draws = int(self.declaration.get("replicates", 0)) if self.declaration.get("replicate") else 0
        return (lambda number: number % draws) if draws else None

    def lost(self) -> dict[str, set[int]]:
        """Seeds of every level whose run ended without a number: it diverged, or it ran out of memory.

        Where the driver has seen the end of the study, those are all that have none: it asks for what was interrupted,
        and for what a person has fixed, until that has ended. Before, those whose run says that it gave no number.
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
        """At how many of the first seeds a level has ended, with a number or without."""
        there = set(self.results("verdict", self.declaration["metric"])[level]) | self.lost()[level]
        return next(n for n in itertools.count() if n not in there)

    def results(self, phase: str = "verdict", metric: str = "") -> dict[str, dict[int, Trial]]:
        """The finished trials that have a metric, by level and seed; of several of one cell the oldest."""
        found: dict[str, dict[int, Trial]] = {level: {} for level in self.levels}
        for trial in self.trials:
            if trial.phase == phase and (trial.has(metric) if metric else trial.finished):
                found.setdefault(trial.level, {}).setdefault(trial.seed, trial)
        return found

    def values(self, metric: str) -> dict[str, dict[int, float]]:
        """A metric of the judged trials, by level and seed."""
        results = self.results("verdict", metric)
        return {level: {n: t.metrics[metric] for n, t in sorted(of.items())} for level, of in results.items()}

    def missing(self) -> list[tuple[str, int]]:
        """Cells that were asked for and have no finished run."""
        there = self.results("verdict", self.declaration["metric"])
        going = [level for level in self.levels if level not in self.stopped]
        return [(level, n) for level in going for n in range(self.seeds) if n not in there[level]]

    def failed(self) -> list[Trial]:
        """Runs without a result that no other run went on from, and runs whose metric is not a number."""
        metric = self.declaration.get("metric", "")
        ended = [t for t in self.trials if t.status in ("FAILED", "KILLED") and not t.went_on]
        without = [(t, not_finite(t.tags, metric)) for t in self.trials if t.finished and t.phase == "verdict"]
        return ended + [replace(trial, reason=reason) for trial, reason in without if reason]

    def link(self, run_id: str) -> str:
        """Where MLflow's pages show a run."""
        return f"{self.address}/#/experiments/{self.experiment}/runs/{run_id}"


def training_curve(history: Sequence[Metric]) -> list[tuple[int, float]]:
    """Steps and values of a metric, without the figure that a stage leaves at its end, which has no step."""
    last = max((m.timestamp for m in history if m.step), default=None)
    return sorted((m.step, m.value) for m in history if m.step or last is None or m.timestamp < last)


def load_study(store: RunStore, name: str, curves: Sequence[str] = ()) -> StudyData:
    """A study from the store.

    Args:
        store: MLflow's.
        name: Of the study.
        curves: Metrics whose values over the training are worth loading; the first that was measured
            :data:`CURVE_POINTS` times is.

    Raises:
        SettingsError: If there is none of that name; names those there are.
        StoreError: If its record has no declaration.
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
        of_run = {run_id: training_curve(store.client.get_metric_history(run_id, metric)) for run_id in judged}
        measured = min(CURVE_POINTS, max(map(len, of_run.values()), default=0))
        if measured > most:
            drawn, points, most = metric, of_run, measured
    tags = record.data.tags
    base = store.pages
    return StudyData(
        name=name,
        run_id=str(record.info.run_id),
        experiment=str(record.info.experiment_id),
        declaration=renamed(declaration, FORMER_NAMES),
        changes=[renamed(json.loads(tags[t]), FORMER_NAMES) for t in sorted(tags) if t.startswith(CHANGE)],
        trials=runs,
        tags=tags,
        curves=points,
        curve=drawn,
        address=base.rstrip("/"),
        status=str(record.info.status),
    )


def _trials(store: RunStore, name: str, record: str) -> Iterator[Trial]:
    """The trials of a study, without those of an earlier one of the same name whose record was deleted."""
    for run in store.search(study=name):
        if run.info.lifecycle_stage == "active" and run.data.tags.get(STUDY_RUN, record) == record:
            yield _judged(store, trial_of(run))


def _judged(store: RunStore, trial: Trial) -> Trial:
    """A trial with the figures of the evaluation that its study asked for.

    The trial's run shows those of the latest evaluation of each metric: another study, or a person, may have evaluated
    the same model with other settings since. Trials of earlier versions do not name their evaluation.
    """
    if JUDGED not in trial.tags:
        return trial
    evaluation = store.run_if_there(trial.tags[JUDGED])
    if evaluation is None or evaluation.info.lifecycle_stage != "active":
        return replace(trial, metrics={}, reason=f"its evaluation, run {trial.tags[JUDGED]}, was deleted")
    tags = {name: value for name, value in trial.tags.items() if name != NOT_FINITE}
    own = {NOT_FINITE: evaluation.data.tags[NOT_FINITE]} if NOT_FINITE in evaluation.data.tags else {}
    return replace(trial, metrics={**trial.metrics, **evaluation.data.metrics}, tags=tags | own)


def trial_of(run: Run) -> Trial:
    """A run as a trial."""
    tags = run.data.tags
    return Trial(
        run_id=str(run.info.run_id),
        phase=tags.get("mmphi.phase", "verdict"),
        level=tags.get("mmphi.level", ""),
        seed=int(tags.get("mmphi.round", "0")),
        status=str(run.info.status),
        reason=tags.get("mmphi.error", ""),
        metrics=run.data.metrics,
        params=renamed(params_of(run), FORMER_NAMES),
        tags=tags,
        started_ms=int(run.info.start_time or 0),
    )


def study_names(store: RunStore) -> list[str]:
    """Names of the studies that the store has."""
    experiments = [str(e.experiment_id) for e in store.client.search_experiments()]
    found = store.client.search_runs(experiments, f"tags.`mmphi.{RECORD}` != ''", max_results=1000)
    return sorted({run.data.tags[f"mmphi.{RECORD}"] for run in found})
