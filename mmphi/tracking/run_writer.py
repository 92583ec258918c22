"""Creates, resumes, finishes and discards runs; lookups are in :mod:`mmphi.tracking.run_store`."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from mlflow.entities import Param, Run
from mlflow.exceptions import MlflowException

from mmphi.errors import StoreError
from mmphi.logs import LOGGER
from mmphi.pipeline.manifest import MANIFEST, write_manifest
from mmphi.tracking.artifacts import download
from mmphi.tracking.lease import HELD, Lease
from mmphi.tracking.logged_model import log_model
from mmphi.tracking.run_store import GENERATED_NAME, RunStore
from mmphi.tracking.run_tracker import RunTracker

if TYPE_CHECKING:
    from mmphi.pipeline.stage import Result

REUSES = "mmphi.reuses"


class TrackingStore(RunStore):
    """The tracking store: finds runs and results, and creates them.

    Args:
        uri: MLflow's tracking URI; by default :func:`absolute_uri`.

    Raises:
        StoreError: If the store cannot be reached.
    """

    def __init__(self, uri: str | None = None) -> None:
        super().__init__(uri)
        self.host = os.environ.get("MMPHI_HOST") or socket.gethostname()

    @contextlib.contextmanager
    def building(
        self, key: str, title: str, tags: Mapping[str, str], run: str, waiting: Callable[[str], None]
    ) -> Iterator[tuple[RunTracker, bool]]:
        """Hold the exclusive right to build a key; yields the run's tracker, and whether it waited for another process.

        On one machine, a file lock ensures this, which is released when its process dies; across machines, the lease.

        Args:
            key: Cache key to build.
            title: Name of the run.
            tags: Tags of the run, such as ``mmphi.stage`` and ``mmphi.key``.
            run: ID of an existing run to use; empty creates one.
            waiting: Called with a description of the holder before a wait.
        """
        lock, waited = FileLock(self.locks / f"{key}.lock"), False
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(lock.acquire(timeout=0))
            except Timeout:
                waited = True
                waiting(self._holder(key))
                held.enter_context(lock.acquire())
            tracker = self.begin(title, tags, run)
            lease = held.enter_context(Lease(self.client, tracker.run_id, self._domain()))
            waited |= lease.claim(lambda: self._others(key, tracker.run_id), waiting)
            yield tracker, waited

    def _others(self, key: str, run_id: str) -> Iterator[Run]:
        return (run for run in self.search(key=key) if run.info.run_id != run_id)

    def _holder(self, key: str) -> str:
        held = next((r for r in self.search("RUNNING", key=key) if r.data.tags.get(HELD) == "held"), None)
        if held is None:
            return "another process"
        return f"process {held.data.tags.get('mmphi.pid', '?')} on {held.data.tags.get('mmphi.host', '?')}"

    def _domain(self) -> str:
        """Unique name of this lock folder, shared by all processes that use it."""
        path = self.locks / "domain"
        with FileLock(self.locks / "domain.lock"):
            if not path.exists():
                path.write_text(uuid.uuid4().hex)
        return path.read_text()

    def begin(self, name: str, tags: Mapping[str, str], run: str = "") -> RunTracker:
        """Create a run, or use an existing one, and return its tracker.

        Args:
            name: Readable name; an existing run keeps a name that a user chose.
            tags: Tags of the run, such as ``mmphi.stage`` and ``mmphi.key``.
            run: ID of an existing run to use; empty creates one.
        """
        if run:
            begun = self.run(run)
            if GENERATED_NAME.fullmatch(begun.info.run_name or ""):
                self.client.update_run(run, name=name)
        else:
            begun = self.client.create_run(self.experiment(), run_name=name, tags={"mlflow.source.name": "mmphi"})
        local = self.local_folder(begun)
        folder = local or self.cache / "work" / tags.get("mmphi.key", str(begun.info.run_id))
        folder.mkdir(parents=True, exist_ok=True)
        tracker = RunTracker(self.client, str(begun.info.run_id), folder, remote=local is None)
        tracker.tags({**tags, "mmphi.host": self.host, "mmphi.pid": str(os.getpid())})
        return tracker

    def adopt(self, tracker: RunTracker, key: str, *, damaged: bool = False) -> str:
        """Move the files of the newest unfinished run of a key to a new run. The caller must hold the key.

        Args:
            tracker: Tracker of the new run.
            key: Cache key that it builds.
            damaged: Whether finished runs whose files have changed count too. The stage must then verify each file
                before use (:attr:`Stage.verifies`).

        Returns:
            ID of the run whose files were taken over; empty if there is none.
        """
        others = self._others(key, tracker.run_id)
        # A run that waits for the lease has a heartbeat, so it is alive: it reuses this result or builds later.
        lease = Lease(self.client, tracker.run_id, self._domain())
        unfinished = (run for run in others if not self._finished(run) or (damaged and not self.is_result(run)))
        dead = [run for run in unfinished if not lease.alive(run)]
        for run in dead:
            if run.info.status == "RUNNING":
                self.client.set_terminated(run.info.run_id, "KILLED")
        source = next((str(run.info.run_id) for run in dead if self._take_files(run, tracker)), "")
        for run in dead:  # Runs that left no file are marked as continued too.
            if "mmphi.continued_by" not in run.data.tags:
                self.client.set_tag(run.info.run_id, "mmphi.continued_by", tracker.run_id)
        if source:
            tracker.tags({"mmphi.continues": source})
        return source

    def _finished(self, run: Run) -> bool:
        return run.info.status == "FINISHED" and self.has_manifest(run)

    def _take_files(self, run: Run, tracker: RunTracker) -> bool:
        """Bring the files of a dead run into a new run's folder; returns whether there were any."""
        folder = self.local_folder(run)
        if folder is not None:
            left = [p for p in folder.iterdir() if p.name != MANIFEST] if folder.is_dir() else []
            for path in left:
                if not (tracker.folder / path.name).exists():
                    shutil.move(path, tracker.folder / path.name)
            return bool(left)
        if any(tracker.folder.iterdir()):
            return True  # The work folder is named by the key, so the files are already here.
        with contextlib.suppress(StoreError):
            download(self.client, str(run.info.run_id), tracker.folder)
        return any(tracker.folder.iterdir())

    def clear(self, tracker: RunTracker) -> None:
        """Delete files that an earlier call left in the run's folder."""
        shutil.rmtree(tracker.folder)
        tracker.folder.mkdir()

    def finish(self, tracker: RunTracker) -> Path:
        """Write the manifest after all other files, mark the run FINISHED, and return the folder of its files.

        Raises:
            StoreError: If another process considered the run dead and took its work over.
        """
        taken = self.run(tracker.run_id).data.tags.get("mmphi.continued_by")
        if taken:
            raise StoreError(
                f"this process sent no heartbeat for so long that run {taken} took its work over",
                "wait for that run; MMPHI_LEASE_S sets the seconds allowed without a heartbeat",
            )
        tracker.flush()
        folder = tracker.folder
        if tracker.remote:
            self.client.log_artifacts(tracker.run_id, str(folder))
        write_manifest(folder)
        if tracker.remote:
            self.client.log_artifact(tracker.run_id, str(folder / MANIFEST))
            kept = self.cache / "runs" / tracker.run_id
            kept.parent.mkdir(parents=True, exist_ok=True)
            folder = folder.rename(kept)
        self.client.set_terminated(tracker.run_id, "FINISHED")
        return folder

    def log_model(self, result: Result) -> None:
        """Log a run's result as an MLflow model; if that fails, a warning is logged and the run stays finished."""
        try:
            log_model(self.client, self.run(result.run_id), result.path, result.stage)
        except (MlflowException, OSError) as error:
            LOGGER.warning(f"run {result.run_id} is finished, but not among MLflow's models: {error}")

    def fail(self, tracker: RunTracker, status: str, why: str) -> None:
        """Mark a run FAILED or KILLED, with the reason; store errors are ignored, so the original error is not lost."""
        with contextlib.suppress(MlflowException, OSError):
            tracker.flush()
            tracker.tags({"mmphi.error": why})
            self.client.set_terminated(tracker.run_id, status)

    def discard(self, tracker: RunTracker, run: str) -> None:
        """Delete a run that is not needed; a run created elsewhere is kept to refer to a result, and loses its key."""
        if not run:
            self.client.delete_run(tracker.run_id)
            if not any(tracker.folder.iterdir()):
                tracker.folder.rmdir()
        else:
            self.client.delete_tag(run, "mmphi.key")

    def copy(self, run: Run, name: str, tags: Mapping[str, str]) -> str:
        """Copy a finished run's parameters and metric curves to a new run; returns its ID.

        A training requested twice, for example by two studies, is run once and shown in both. If a finished run with
        these tags exists, its ID is returned.

        Args:
            run: The finished run.
            name: Name of the new run.
            tags: Tags of the new run, in addition to those copied from the finished run.
        """
        known = next(iter(self.search("FINISHED", **{k.removeprefix("mmphi."): v for k, v in tags.items()})), None)
        if known is not None:
            return str(known.info.run_id)
        ours = ("mmphi.key", "mmphi.stage", "mmphi.study", "mmphi.level", "mmphi.cell", "mmphi.lease", "mlflow.runName")
        kept = {k: v for k, v in run.data.tags.items() if not k.startswith(ours) and k != "mlflow.loggedArtifacts"}
        source = str(run.info.run_id)
        made = self.client.create_run(
            self.experiment(), start_time=run.info.start_time, run_name=name, tags={**kept, **tags, REUSES: source}
        )
        run_id = str(made.info.run_id)
        params = [Param(*item) for item in run.data.params.items() if not item[0].startswith("study.")]
        for first in range(0, len(params), 100):
            self.client.log_batch(run_id, params=params[first : first + 100])
        for metric in run.data.metrics:
            history = self.client.get_metric_history(source, metric)
            for first in range(0, len(history), 500):
                self.client.log_batch(run_id, metrics=history[first : first + 500])
        self.client.set_terminated(run_id, "FINISHED", end_time=run.info.end_time)
        return run_id

    def point(self, run: str, result: Result, preset: str) -> None:
        """Make an existing run refer to the result that was reused for it, and copy the result's metrics."""
        tags = {"mmphi.stage": result.stage, REUSES: result.run_id, "mmphi.preset": preset}
        tracker = self.begin(f"{result.stage} {preset} (reused)", tags, run)
        tracker.metrics(result.metrics)
        tracker.flush()
