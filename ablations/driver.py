"""The driver of a study: chooses the next trial, sends it to a worker, and records its outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ablations.protocol import TrialRequest, TrialResponse
from ablations.study import Study
from ablations.study_run import StudyChange, StudyRun
from ablations.trial_storage import TrialStorage, trial_spec_of
from ablations.trials import TrialResult, TrialSpec, verdict_trials
from ablations.tuning import tuning_of, tuning_trials
from ablations.worker_pool import WorkerPool, WorkerProcess
from mmphi.errors import MmphiError, SettingsError
from reports.study_query import STUDY_RUN

if TYPE_CHECKING:
    import optuna

POLL_S = 1.0


class TrialError(MmphiError):
    """A trial that fails until a user fixes its cause."""


@dataclass(frozen=True)
class RevisedStudy:
    """A study after the changes that were made while it ran.

    Attributes:
        study: The study with added levels and the current number of seeds.
        stopped: Levels that get no more trials.
    """

    study: Study
    stopped: frozenset[str] = frozenset()

    @property
    def levels(self) -> list[str]:
        """Levels that are not stopped."""
        return [level for level in self.study.levels if level not in self.stopped]


def revise_study(study: Study, changes: list[StudyChange]) -> RevisedStudy:
    """Apply changes to a study."""
    stopped: set[str] = set()
    for change in changes:
        if change.what == "stop":
            stopped.add(change.name)
        elif change.what == "add":
            stopped.discard(change.name)
            study = replace(study, levels={**study.levels, change.name: change.value})
        elif change.what == "seeds":
            study = replace(study, seeds=int(change.value))
    return RevisedStudy(study, frozenset(stopped))


class Driver:
    """Runs the trials of a study on workers.

    Args:
        study: The study as declared.
        record: The study run in MLflow.
        storages: Trial storages by phase.
        retries: How many times a trial is repeated after it crashes or its worker dies.
        say: Function that prints a line.
    """

    def __init__(
        self,
        study: Study,
        record: StudyRun,
        storages: Mapping[str, TrialStorage],
        *,
        retries: int = 5,
        say: Callable[[str], None] = tqdm.write,
    ) -> None:
        self.declared, self.record, self.retries, self.say = study, record, retries, say
        self.storages = storages
        self.plan = RevisedStudy(study)
        self._trials: dict[int, tuple[TrialStorage, optuna.trial.Trial, TrialSpec]] = {}
        self._given = 0

    def wanted(self) -> list[TrialSpec]:
        """Trials that have not ended, in the order in which they run.

        Verdict trials follow only after all tuning has ended; otherwise the level that is tuned first would be rounds
        ahead of the others.
        """
        study, levels = self.plan.study, self.plan.levels
        outcomes = self.storages["tuning"].outcomes()
        tunings = [tuning_of(study, level, outcomes) for level in levels]
        tuning = list(tuning_trials(tunings))
        best = {each.level: each.chosen for each in tunings if each.chosen is not None}
        judged = verdict_trials(best, study.seeds)
        return tuning or _without(judged, self.storages["verdict"].outcomes())

    def run(self, workers: int, logs: Path, **worker_options: Any) -> None:
        """Run all trials that have not ended.

        Args:
            workers: Number of worker processes.
            logs: Folder of the worker logs.
            **worker_options: Further arguments of :class:`WorkerPool`.

        Raises:
            TrialError: If a trial fails until a user fixes its cause; finished results are kept.
        """
        with ExitStack() as held:
            for storage in self.storages.values():
                held.enter_context(storage.owned())
            team, bar = held.enter_context(WorkerPool(workers, logs, **worker_options)), held.enter_context(self._bar())
            while True:
                self.plan = revise_study(self.declared, self.record.changes())
                wanted = self.wanted()
                self._show(bar, wanted)
                elsewhere = set().union(*(storage.running() for storage in self.storages.values()))
                free = [cell for cell in wanted if cell.name not in elsewhere]
                for worker in team.idle():
                    if free:
                        self._give(team, worker, free.pop(0))
                if not wanted and not team.busy():
                    return
                for worker, answer in team.listen(POLL_S):
                    self._handle(worker, answer)
                for storage in self.storages.values():
                    storage.beat()

    def _bar(self) -> Any:
        return tqdm(desc=self.record.name, unit="trial", dynamic_ncols=True)

    def _show(self, bar: Any, wanted: list[TrialSpec]) -> None:
        verdicts = self.storages["verdict"].outcomes()
        done = len(verdicts) + len(self.storages["tuning"].outcomes())
        judged = sum(outcome.cell.level in self.plan.levels for outcome in verdicts)
        tuning = any(cell.phase == "tuning" for cell in wanted)
        later = len(self.plan.levels) * self.plan.study.seeds - judged if tuning else 0
        if (bar.n, bar.total) != (done, done + len(wanted) + later):
            bar.total = done + len(wanted) + later
            bar.update(done - bar.n)
            bar.refresh()

    def _give(self, team: WorkerPool, worker: WorkerProcess, cell: TrialSpec) -> None:
        storage = self.storages[cell.phase]
        trial = storage.take(cell, list(self.plan.study.levels).index(cell.level))
        if trial is None:
            return
        got = trial_spec_of(trial)
        self._given += 1
        self._trials[self._given] = storage, trial, got
        team.give(worker, self.job(self._given, got))

    def job(self, number: int, cell: TrialSpec) -> TrialRequest:
        """Build the request for a trial."""
        study = self.plan.study
        tuning = cell.phase == "tuning"
        tokens = study.tuning_tokens if tuning and study.tuning_tokens else study.tokens
        seed = cell.number if tuning else study.seed(cell.level, cell.number)
        settings = study.settings(cell.level, seed, cell.nuisance, tokens, study.draw(cell.number))
        return TrialRequest(
            number=number,
            stage=study.stage,
            settings=settings.model_dump(),
            title=f"{cell.level}, {'tuning' if tuning else 'seed'} {cell.number} of {self.record.name}",
            tags={
                "mmphi.study": self.record.name,
                STUDY_RUN: self.record.run_id,
                "mmphi.factor": study.factor,
                "mmphi.level": cell.level,
                "mmphi.seed": str(seed),
                "mmphi.round": str(cell.number),
                "mmphi.phase": cell.phase,
                "mmphi.cell": cell.name,
                **({"mmphi.draw": str(study.draw(cell.number))} if study.replicate else {}),
            },
            params={"study.level": cell.level, "study.seed": str(seed)},
            metric=study.tuning_metric if tuning else study.metric,
            after=not tuning,
            costs=not tuning,
        )

    def _handle(self, worker: WorkerProcess, answer: TrialResponse | None) -> None:
        if answer is None:
            self._died(worker)
            return
        worker.job = None
        storage, trial, cell = self._trials.pop(answer.number)
        if answer.kind == "done":
            study = self.plan.study
            metric = study.tuning_metric if cell.phase == "tuning" else study.metric
            value = answer.metrics[metric]
            storage.tell(trial, [value], answer.run_id)
            self.say(f"{cell.name}: {metric} {value:.4f}, {answer.seconds:.0f} s")
        elif answer.kind == "failed":
            storage.fail(trial, answer.reason, final=True)
            self.say(f"{cell.name}: no result: {answer.reason}")
        elif answer.kind == "crashed":
            self._again(storage, trial, cell, "crashed", answer.reason)
        else:
            storage.fail(trial, answer.reason, final=False)
            if answer.kind == "broken":
                raise TrialError(
                    f"{cell.name} cannot be run: {answer.reason}",
                    "fix the cause and run the same command again; finished trials are kept",
                )

    def _died(self, worker: WorkerProcess) -> None:
        """Fail the trial of a worker that died; the trial is repeated unless its retries are used up."""
        if worker.job is None:
            return
        storage, trial, cell = self._trials.pop(worker.job.number)
        code = worker.process.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if worker.ready:
            self._again(storage, trial, cell, "its worker died", how)
        else:  # The worker died before it started the trial, so this does not count as a retry.
            storage.fail(trial, f"its worker did not start: {how}", final=False)

    def _again(self, storage: TrialStorage, trial: optuna.trial.Trial, cell: TrialSpec, what: str, how: str) -> None:
        deaths = storage.deaths(cell) + 1
        final = deaths > self.retries
        reason = f"{what} {deaths} times, last by {how}" if deaths > 1 else f"{what} by {how}"
        storage.fail(trial, reason, final=final, died=True)
        self.say(f"{cell.name}: {reason}{'' if final else '; asking again'}")


def _without(cells: Iterable[TrialSpec], outcomes: Sequence[TrialResult]) -> list[TrialSpec]:
    """Trials that have not ended."""
    ended = {outcome.cell.name for outcome in outcomes}
    return [cell for cell in cells if cell.name not in ended]


def level_value(study: Study, name: str, typed: str) -> Any:
    """Parse the value of an added level from the command line.

    Args:
        study: Study that the level is added to.
        name: Name of the level.
        typed: ``value``, or ``setting=value,setting=value`` if the factor has several fields.

    Raises:
        SettingsError: If the factor has several fields and a part of ``typed`` is not ``setting=value``.
    """
    if not study.fields:
        return typed
    pairs = [part.partition("=") for part in typed.split(",")]
    if any(not equals for _, equals, _ in pairs):
        raise SettingsError(
            f"level {name!r}: {typed!r} gives no settings", f"write {','.join(f'{f}=VALUE' for f in study.fields)}"
        )
    return {key.strip(): value for key, _, value in pairs}
