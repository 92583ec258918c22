"""The driver of a search: Optuna suggests settings; each trial trains them at one seed after another until pruned."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState
from tqdm.auto import tqdm

from ablations.driver import POLL_S, TrialError
from ablations.protocol import TrialRequest, TrialResponse
from ablations.search import Search
from ablations.study_run import StudyRun
from ablations.trial_storage import TrialStorage
from ablations.worker_pool import WorkerPool, WorkerProcess
from reports.study_query import STUDY_RUN

if TYPE_CHECKING:
    import optuna

ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass
class ActiveTrial:
    """A trial that has not ended.

    Attributes:
        trial: The Optuna trial.
        origin: Displayed number: that of the trial, or of the dead trial that it repeats.
        found: Values of the objectives, one list per finished seed.
        runs: Ids of the MLflow runs.
        running: Whether a worker is training it.
        died: How many times it crashed or its worker died.
    """

    trial: optuna.trial.Trial
    origin: int
    found: list[list[float]] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    running: bool = False
    died: int = 0


class SearchDriver:
    """Runs a search on workers.

    Args:
        search: The search as declared.
        record: The study run in MLflow.
        storage: Trial storage of the search.
        retries: How many times a trial is repeated after it crashes or its worker dies.
        say: Function that prints a line.
    """

    def __init__(
        self,
        search: Search,
        record: StudyRun,
        storage: TrialStorage,
        *,
        retries: int = 5,
        say: Callable[[str], None] = tqdm.write,
    ) -> None:
        self.search, self.record, self.storage, self.retries, self.say = search, record, storage, retries, say
        self.active: dict[int, ActiveTrial] = {}

    def done(self) -> int:
        """Number of trials that are complete, pruned or finally failed."""
        ended = self.storage.trials(*ENDED)
        return sum(t.state != TrialState.FAIL or t.user_attrs.get("final", False) for t in ended)

    def run(self, workers: int, logs: Path, **worker_options: Any) -> None:
        """Run until the declared number of trials has ended.

        Args:
            workers: Number of worker processes.
            logs: Folder of the worker logs.
            **worker_options: Further arguments of :class:`WorkerPool`.

        Raises:
            TrialError: If a trial fails until a user fixes its cause; finished results are kept.
        """
        with self.storage.owned(), WorkerPool(workers, logs, **worker_options) as team:
            self._ask_again()
            with tqdm(desc=self.record.name, unit="trial", total=self.search.trials, dynamic_ncols=True) as bar:
                while (done := self.done()) < self.search.trials or team.busy():
                    bar.update(done - bar.n)
                    for worker in team.idle():
                        self._give(team, worker)
                    for worker, answer in team.listen(POLL_S):
                        self._handle(team, worker, answer)
                    self.storage.beat()
                    if self.storage.shared:
                        self._ask_again()  # Trials of drivers whose heartbeats stopped.
                bar.update(self.done() - bar.n)

    def _ask_again(self) -> None:
        """Enqueue the trials that a dead driver left unfinished, with the same settings and displayed number."""
        again = {t.user_attrs.get("again_of") for t in self.storage.trials()}
        for trial in self.storage.trials(TrialState.FAIL):
            known = trial.number in again or trial.user_attrs.get("twice") or trial.user_attrs.get("final")
            if not known:
                origin = trial.user_attrs.get("origin", trial.number)
                attributes = {"origin": origin, "again_of": trial.number}
                self.storage.study.enqueue_trial(trial.params, user_attrs=attributes)

    def _give(self, team: WorkerPool, worker: WorkerProcess) -> None:
        waiting = next((a for a in self.active.values() if not a.running), None)
        if waiting is None:
            running = len(self.storage.trials(TrialState.RUNNING))  # By any driver.
            if self.done() + running >= self.search.trials:
                return
            trial = self.storage.study.ask(self.search.distributions())
            if self._twice(trial):
                self.storage.storage.set_trial_user_attr(trial._trial_id, "twice", True)
                self.storage.fail(trial, "another driver asked for the same again", final=False)
                return
            self.storage.mine[trial.number] = trial
            waiting = ActiveTrial(trial, int(trial.user_attrs.get("origin", trial.number)))
            self.active[trial.number] = waiting
        waiting.running = True
        team.give(worker, self.job(waiting))

    def _twice(self, trial: optuna.trial.Trial) -> bool:
        """Whether an earlier trial repeats the same dead trial, enqueued by another driver."""
        again = trial.user_attrs.get("again_of")
        before = (t for t in self.storage.trials() if t.number < trial.number)
        return again is not None and any(t.user_attrs.get("again_of") == again for t in before)

    def job(self, active: ActiveTrial) -> TrialRequest:
        """Build the request for the next seed of a trial."""
        place = len(active.found)
        seed = self.search.seeds[place]
        name = f"trial {active.origin}"
        judged_on_test = any(metric.startswith("test/") for metric in self.search.objectives)
        return TrialRequest(
            number=active.trial.number,
            stage=self.search.stage,
            settings=self.search.settings(active.trial.params, seed).model_dump(),
            title=f"{name}, seed {seed} of {self.record.name}",
            tags={
                "mmphi.study": self.record.name,
                STUDY_RUN: self.record.run_id,
                "mmphi.level": name,
                "mmphi.seed": str(seed),
                "mmphi.round": str(place),
                "mmphi.phase": "search",
                "mmphi.cell": f"search/{name}/{seed}",
            },
            params={"study.level": name, "study.seed": str(seed)},
            metric=next(iter(self.search.objectives)),
            after=judged_on_test,
            costs=any(metric.startswith("cost/") for metric in self.search.objectives),
            reports=self.search.reports if self.search.pruner == "hyperband" else "",
        )

    def _handle(self, team: WorkerPool, worker: WorkerProcess, answer: TrialResponse | None) -> None:
        if answer is None:
            self._died(worker)
            return
        active = self.active[answer.number]
        if answer.kind == "report":
            step = int(answer.metrics["step"])
            active.trial.report(answer.metrics[self.search.reports], step)
            team.reply(worker, not active.trial.should_prune())
            return
        worker.job, active.running = None, False
        if answer.kind == "done":
            self._measured(active, answer)
        elif answer.kind == "crashed":
            self._again(active, f"crashed: {answer.reason}")
        elif answer.kind == "pruned":
            self._end(active, f"pruned: {answer.reason}")
            self.storage.study.tell(active.trial, state=TrialState.PRUNED)
        else:
            self._end(active, f"no result: {answer.reason}")
            self.storage.fail(active.trial, answer.reason, final=answer.kind == "failed")
            if answer.kind == "broken":
                raise TrialError(
                    f"trial {active.origin} cannot be run: {answer.reason}",
                    "fix the cause and run the same command again; finished trials are kept",
                )

    def _measured(self, active: ActiveTrial, answer: TrialResponse) -> None:
        lacking = [name for name in self.search.objectives if name not in answer.metrics]
        if lacking:
            raise TrialError(f"run {answer.run_id} has no metric {lacking[0]!r}", f"it has {sorted(answer.metrics)}")
        active.found.append([answer.metrics[name] for name in self.search.objectives])
        active.runs.append(answer.run_id)
        over = len(active.found) == len(self.search.seeds)
        means = [statistics.fmean(values) for values in zip(*active.found, strict=True)]
        if self.search.pruner == "wilcoxon":
            active.trial.report(active.found[-1][0], self.search.seeds[len(active.found) - 1])
            if not over and active.trial.should_prune():
                # As Optuna recommends, a pruned trial completes with its mean, which is more informative than the value
                # of its last seed.
                self.storage.storage.set_trial_user_attr(active.trial._trial_id, "pruned_after", len(active.found))
                over = True
        if over:
            values = ", ".join(f"{n} {v:.4f}" for n, v in zip(self.search.objectives, means, strict=True))
            self._end(active, f"{values} over {len(active.found)} of {len(self.search.seeds)} seeds")
            self.storage.tell(active.trial, means, ", ".join(active.runs))

    def _end(self, active: ActiveTrial, how: str) -> None:
        self.active.pop(active.trial.number)
        self.storage.mine.pop(active.trial.number, None)
        settings = ", ".join(f"{name} {value}" for name, value in active.trial.params.items())
        self.say(f"trial {active.origin} ({settings}): {how}")

    def _died(self, worker: WorkerProcess) -> None:
        if worker.job is None:
            return
        active = self.active[worker.job.number]
        if worker.ready:
            self._again(active, "its worker died")
        else:
            active.running = False

    def _again(self, active: ActiveTrial, how: str) -> None:
        active.died, active.running = active.died + 1, False
        if active.died > self.retries:
            self._end(active, f"no result: {how}")
            self.storage.fail(active.trial, f"{how} ({active.died} times)", final=True, died=True)
        else:
            self.say(f"trial {active.origin}: {how}; asking again")
