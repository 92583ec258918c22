"""Trial storage: the Optuna study that holds the queued, running and ended trials of a study.

A SQLite study has exactly one driver. Several drivers, on several machines, may share a study in PostgreSQL: Optuna
gives each queued trial to one driver only, each driver sends heartbeats for its trials, and trials whose heartbeats
stop are failed by the other drivers and queued again.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from ablations.finished_trials import FinishedTrials
from ablations.trials import TrialResult, TrialSpec
from mmphi.errors import StoreError
from mmphi.tracking.lease import lease_s
from mmphi.tracking.uri import SQLITE, database

MOST = 100_000  # Upper bound of the numbers of levels and seeds.
RECORD = "record"  # User attribute of the Optuna study: id of the study run in MLflow.
WAIT_S = 60  # Timeout for a SQLite database that another process is writing to.


def connect(url: str) -> RDBStorage:
    """Open Optuna's storage at a URL.

    Raises:
        StoreError: If the storage cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sqlite = url.startswith(SQLITE)
    if sqlite:
        Path(url.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
    heartbeat = None if sqlite else max(1, int(lease_s() / 3))
    arguments = {"connect_args": {"timeout": WAIT_S}} if sqlite else {"pool_pre_ping": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna marks heartbeats as experimental.
        try:
            return RDBStorage(
                url,
                engine_kwargs=arguments,
                heartbeat_interval=heartbeat,
                grace_period=heartbeat and max(2, int(lease_s())),
            )
        except Exception as error:  # The exceptions depend on the database driver.
            first = str(error).splitlines()[0]
            hint = "pip install 'psycopg[binary]'" if isinstance(error, ImportError) else "check --storage"
            raise StoreError(f"the study's storage {_without_password(url)} cannot be used: {first}", hint) from error


def _without_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    return f"{head.partition('//')[0]}//...@{tail}" if at else url


class TrialStorage:
    """The trials of one study in Optuna.

    Args:
        url: URL of Optuna's storage.
        name: Name of the study.
        directions: Direction of each value.
        sampler: Optuna sampler of a search.
        pruner: Optuna pruner of a search.
        record: Id of the study run in MLflow. If an earlier study of the same name, whose study run was deleted, has
            trials in Optuna, they are kept under that name and the new study gets another name in Optuna.
        results: Detects deleted runs; trials whose run was deleted count as having no result.

    Attributes:
        name: Name of the study in Optuna.
        shared: Whether other drivers may run the same study at the same time.
    """

    def __init__(
        self,
        url: str,
        name: str,
        directions: Sequence[Literal["minimize", "maximize"]],
        sampler: optuna.samplers.BaseSampler | None = None,
        pruner: optuna.pruners.BasePruner | None = None,
        *,
        record: str = "",
        results: FinishedTrials | None = None,
    ) -> None:
        self.url, self.shared, self._results = url, not url.startswith(SQLITE), results
        self.storage = connect(url)
        self.name = self._own_name(name, record)
        self.study = optuna.create_study(
            study_name=self.name,
            storage=self.storage,
            directions=list(directions),
            sampler=sampler,
            pruner=pruner,
            load_if_exists=True,
        )
        if record and not self.study.user_attrs.get(RECORD):
            self.study.set_user_attr(RECORD, record)
        self.mine: dict[int, optuna.trial.Trial] = {}

    def _own_name(self, name: str, record: str) -> str:
        """The name, or a derived one if trials of an earlier study use it."""
        if not record or name not in optuna.get_all_study_names(self.storage):
            return name
        known = optuna.load_study(study_name=name, storage=self.storage)
        if owner := known.user_attrs.get(RECORD):
            return name if owner == record else f"{name} {record[:8]}"
        # Earlier versions of mmphi did not store the id. Such an Optuna study counts as an earlier, deleted study only
        # if all of its runs were deleted.
        runs = {t.user_attrs.get("run_id", "") for t in known.get_trials(deepcopy=False)} - {""}
        deleted = self._results.gone(runs) if self._results is not None else set()
        return f"{name} {record[:8]}" if runs and runs == deleted else name

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the lock of a SQLite study, and fail the trials that a dead driver left running.

        Raises:
            StoreError: If another driver holds the lock.
        """
        file = database(self.url)
        if file is None:
            yield
            return
        lock = FileLock(file.with_name(f".{file.name}.{self.name.replace('/', '_')}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise StoreError(
                f"another process on this machine runs the study {self.name}",
                f"watch it: mmphi studies {self.name} --watch; several drivers share a study in PostgreSQL: --storage",
            ) from error
        try:
            for trial in self.trials(TrialState.RUNNING):
                self._fail(trial, "its driver ended", final=False)
            yield
        finally:
            lock.release()

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Optuna trials in the given states (all states if empty), in order of number."""
        return list(self.study.get_trials(deepcopy=False, states=states or None))

    def outcomes(self) -> list[TrialResult]:
        """Results of the ended trials, one per trial name, without those whose run was deleted."""
        found: dict[str, TrialResult] = {}
        ended = self.trials(TrialState.COMPLETE, TrialState.FAIL)
        runs = [t.user_attrs.get("run_id", "") for t in ended if t.state == TrialState.COMPLETE]
        deleted = self._results.gone(runs) if self._results is not None else set()
        for trial in ended:
            if trial.state == TrialState.COMPLETE and trial.user_attrs.get("run_id") in deleted:
                continue
            if trial.state == TrialState.COMPLETE or trial.user_attrs.get("final"):
                cell = trial_spec_of(trial)
                value = trial.value if trial.state == TrialState.COMPLETE else None
                found.setdefault(cell.name, TrialResult(cell, value, trial.user_attrs.get("reason", "")))
        return list(found.values())

    def running(self) -> set[str]:
        """Names of the trials that any driver is running."""
        return {trial_spec_of(trial).name for trial in self.trials(TrialState.RUNNING)}

    def deaths(self, cell: TrialSpec) -> int:
        """Number of times a trial crashed or its worker died."""
        failed = self.trials(TrialState.FAIL)
        return sum(t.user_attrs.get("died", False) and trial_spec_of(t).name == cell.name for t in failed)

    def take(self, cell: TrialSpec, level: int) -> optuna.trial.Trial | None:
        """Queue a trial and take one from the queue; ``None`` if another driver took it.

        The returned trial may be another one that a driver queued before it died.

        Args:
            cell: Trial to queue.
            level: Index of its level, a parameter of the Optuna trial.
        """
        self.study.enqueue_trial({"level": level, "seed": cell.number}, user_attrs={"cell": asdict(cell)})
        place = IntDistribution(0, MOST)
        spaces: dict[str, BaseDistribution] = {"level": place, "seed": place}
        while True:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Optuna warns that ask() sends no heartbeats; `beat` sends them.
                trial = self.study.ask(spaces)
            if "cell" not in trial.user_attrs:  # The queue was empty, so Optuna sampled a new trial.
                self._fail(trial, "another driver was faster", final=False)
                return None
            if not self._elsewhere(trial):
                self.mine[trial.number] = trial
                self.beat()
                return trial
            self._fail(trial, "this cell is run, or was run, by another trial", final=False)

    def _elsewhere(self, trial: optuna.trial.Trial) -> bool:
        """Whether the same trial has a result, or is being run by an earlier Optuna trial."""
        name = trial_spec_of(trial).name
        ended = any(o.cell.name == name for o in self.outcomes())
        earlier = (t for t in self.trials(TrialState.RUNNING) if t.number < trial.number)
        return ended or any(trial_spec_of(t).name == name for t in earlier)

    def tell(self, trial: optuna.trial.Trial, values: Sequence[float], run_id: str) -> None:
        """Record the result of a trial.

        If another driver has failed the trial because heartbeats were missing, the trial is queued again. Its finished
        run is then found in MLflow, so nothing is trained twice.

        Args:
            trial: Optuna trial.
            values: Value of each objective.
            run_id: Id of the MLflow run, or several separated by commas.
        """
        self._note(trial, run_id=run_id)
        self.study.tell(trial, list(values), skip_if_finished=True)
        self.mine.pop(trial.number, None)

    def fail(self, trial: optuna.trial.Trial, reason: str, *, final: bool, died: bool = False) -> None:
        """Record that a trial ended without a result.

        Args:
            trial: Optuna trial.
            reason: Why there is no result.
            final: Whether the failure is final; otherwise the trial is queued again.
            died: Whether it crashed or its worker died.
        """
        if died:
            self._note(trial, died=True)
        self._fail(trial, reason, final=final)
        self.mine.pop(trial.number, None)

    def _fail(self, trial: Any, reason: str, *, final: bool) -> None:
        self._note(trial, reason=reason, final=final)
        self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _note(self, trial: Any, **values: Any) -> None:
        """Set user attributes of a trial, unless another driver has ended it."""
        with contextlib.suppress(UpdateFinishedTrialError):
            for name, value in values.items():
                self.storage.set_trial_user_attr(trial._trial_id, name, value)

    def beat(self) -> None:
        """Send heartbeats for this driver's trials, and fail trials whose heartbeats stopped; no-op with SQLite."""
        if not self.shared:
            return
        for trial in self.mine.values():
            self.storage.record_heartbeat(trial._trial_id)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fail_stale_trials(self.study)


def trial_spec_of(trial: FrozenTrial | optuna.trial.Trial) -> TrialSpec:
    """The trial spec that an Optuna trial stores."""
    stored: Mapping[str, Any] = trial.user_attrs.get("cell", {"phase": "search", "level": "", "number": trial.number})
    return TrialSpec(**stored)
