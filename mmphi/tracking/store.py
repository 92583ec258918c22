"""The store of runs, the only store: a run is the result of its key when it is FINISHED and its manifest holds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from mmphi.errors import StoreError
from mmphi.keys import cache_folder
from mmphi.locks import locked
from mmphi.manifest import MANIFEST, manifest_holds, write_manifest
from mmphi.tracking.connect import connected
from mmphi.tracking.run import RunTracker
from mmphi.tracking.uri import absolute_uri, database

EXPERIMENT = "mmphi"
GENERATED_NAME = re.compile(r"[a-z]+-[a-z]+-\d+")  # As MLflow names a run that was given no name.


class Store:
    """Runs, found by what they are the result of.

    Args:
        uri: MLflow's tracking URI; by default as :func:`absolute_uri` has it.

    Raises:
        StoreError: If the store cannot be reached.
    """

    def __init__(self, uri: str | None = None) -> None:
        self.uri = uri or absolute_uri()
        self.host = socket.gethostname()
        self._cache = cache_folder() / hashlib.sha256(self.uri.encode()).hexdigest()[:8]
        file = database(self.uri)
        self._locks = file.parent / "mlruns" / ".locks" if file else self._cache / "locks"
        with locked(self._locks / "database"):  # Two processes must not both make its tables.
            self.client = connected(self.uri)

    @contextlib.contextmanager
    def lock(self, key: str, waiting: Callable[[str], None]) -> Iterator[bool]:
        """Be the only process of this machine that builds ``key``; yields whether another had to be waited for."""
        with locked(self._locks / key, waiting) as waited:
            yield waited

    def given(self) -> Run | None:
        """The run that ``mlflow run`` began for this process.

        Raises:
            StoreError: If it is not in this store.
        """
        run_id = os.environ.get("MLFLOW_RUN_ID")
        if not run_id:
            return None
        try:
            return self.client.get_run(run_id)
        except MlflowException as error:
            raise StoreError(
                f"MLFLOW_RUN_ID is {run_id}, but {self.uri} has no such run",
                "give `mlflow run` an absolute MLFLOW_TRACKING_URI, or unset MLFLOW_RUN_ID",
            ) from error

    def experiment(self) -> str:
        """Id of the experiment to record in: the given run's, else the environment's, else ``mmphi``.

        Raises:
            StoreError: If it was deleted.
        """
        given = self.given()
        if given:
            return str(given.info.experiment_id)
        if os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return os.environ["MLFLOW_EXPERIMENT_ID"]
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        found = self.client.get_experiment_by_name(name)
        if found and found.lifecycle_stage == "deleted":
            command = f"mlflow experiments restore --experiment-id {found.experiment_id}"
            raise StoreError(
                f"the experiment {name} is deleted", f"{command}, or name another in MLFLOW_EXPERIMENT_NAME"
            )
        if found:
            return str(found.experiment_id)
        file = database(self.uri)
        root = (file.parent / "mlruns" / re.sub(r"[^\w.-]", "_", name)).as_uri() if file else None
        # Without its kind, MLflow's pages take an experiment with tables for the evaluation of agents.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        return str(self.client.create_experiment(name, artifact_location=root, tags=tags))

    def search(self, **tags: str) -> list[Run]:
        """Runs of all experiments with these tags of ours (``key=...`` is ``mmphi.key``), newest first."""
        experiments = [str(e.experiment_id) for e in self.client.search_experiments()]
        text = " and ".join(f"tags.`mmphi.{name}` = '{value}'" for name, value in tags.items())
        return list(self.client.search_runs(experiments, text, order_by=["attributes.start_time DESC"]))

    def result(self, key: str) -> Run | None:
        """The newest run that is a result of ``key``."""
        return next((run for run in self.search(key=key) if self.is_result(run)), None)

    def is_result(self, run: Run) -> bool:
        """Whether a run is FINISHED and its manifest holds; a status alone proves nothing, others set it too."""
        if run.info.status != "FINISHED":
            return False
        folder = self.local_folder(run)
        # What a remote store holds is confirmed when it is fetched.
        return manifest_holds(folder) if folder is not None else self._has_manifest(run)

    def local_folder(self, run: Run) -> Path | None:
        """Where the artifacts of a run lie, or ``None`` where they are not on this machine."""
        parsed = urlparse(run.info.artifact_uri)
        if parsed.scheme == "file":
            return Path(unquote(parsed.path))
        return Path(run.info.artifact_uri) if not parsed.scheme else None

    def fetch(self, run: Run) -> Path:
        """The artifacts of a finished run on this machine; downloaded once where the store is remote.

        Raises:
            StoreError: If what arrives is not what the manifest says.
        """
        local = self.local_folder(run)
        if local is not None:
            return local
        run_id = str(run.info.run_id)
        folder, part = self._cache / "runs" / run_id, self._cache / "runs" / f"{run_id}.part"
        if manifest_holds(folder):
            return folder
        for left in (folder, part):
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            self.client.download_artifacts(run_id, "", str(part))
        except (MlflowException, OSError) as error:
            raise StoreError(f"the artifacts of run {run_id} cannot be fetched: {error}", "try again later") from error
        if not manifest_holds(part):
            raise StoreError(f"the artifacts of run {run_id} are not what its manifest says", "delete that run")
        for name, (_, _, modified_ns) in json.loads((part / MANIFEST).read_text()).items():
            os.utime(part / name, ns=(modified_ns, modified_ns))
        part.rename(folder)
        return folder

    def begin(self, name: str, tags: Mapping[str, str], given: Run | None) -> RunTracker:
        """Begin a run, or go on in the one given.

        Args:
            name: Readable name; a given run keeps a name that a person chose.
            tags: ``mmphi.stage``, ``mmphi.key``, ...
            given: The run that ``mlflow run`` began.
        """
        if given:
            run = given
            if GENERATED_NAME.fullmatch(run.info.run_name or ""):
                self.client.update_run(run.info.run_id, name=name)
        else:
            run = self.client.create_run(self.experiment(), run_name=name, tags={"mlflow.source.name": "mmphi"})
        local = self.local_folder(run)
        folder = local or self._cache / "work" / tags["mmphi.key"]
        folder.mkdir(parents=True, exist_ok=True)
        tracker = RunTracker(self.client, str(run.info.run_id), folder, remote=local is None)
        tracker.tags({**tags, "mmphi.host": self.host, "mmphi.pid": str(os.getpid())})
        return tracker

    def adopt(self, tracker: RunTracker, key: str) -> str:
        """Move what the newest dead run of ``key`` left into a new run's folder; to be called with the key's lock held.

        Returns:
            Id of the run gone on from, empty where there is none.
        """
        source = ""
        for run in self.search(key=key):
            run_id, status = str(run.info.run_id), run.info.status
            elsewhere = status == "RUNNING" and run.data.tags.get("mmphi.host") != self.host
            if run_id == tracker.run_id or elsewhere or (status == "FINISHED" and self._has_manifest(run)):
                continue
            if status == "RUNNING":
                self.client.set_terminated(run_id, "KILLED")
            if not source and self._move(run, tracker):
                source = run_id
                self.client.set_tag(run_id, "mmphi.continued_by", tracker.run_id)
                tracker.tags({"mmphi.continues": run_id})
        return source

    def _has_manifest(self, run: Run) -> bool:
        folder = self.local_folder(run)
        if folder is not None:
            return (folder / MANIFEST).exists()
        return any(f.path == MANIFEST for f in self.client.list_artifacts(run.info.run_id))

    def _move(self, run: Run, tracker: RunTracker) -> bool:
        folder = self.local_folder(run)
        if folder is None:
            return any(tracker.folder.iterdir())  # The work folder goes by the key: it is here already.
        left = [p for p in folder.iterdir() if p.name != MANIFEST] if folder.is_dir() else []
        for path in left:
            if not (tracker.folder / path.name).exists():
                shutil.move(path, tracker.folder / path.name)
        return bool(left)

    def clear(self, tracker: RunTracker) -> None:
        """Forget what an earlier call left for this run."""
        shutil.rmtree(tracker.folder)
        tracker.folder.mkdir()

    def finish(self, tracker: RunTracker) -> Path:
        """Write the manifest, last of all files, and mark the run FINISHED; returns where the files lie."""
        tracker.flush()
        folder = tracker.folder
        if tracker.remote:
            self.client.log_artifacts(tracker.run_id, str(folder))
        write_manifest(folder)
        if tracker.remote:
            self.client.log_artifact(tracker.run_id, str(folder / MANIFEST))
            kept = self._cache / "runs" / tracker.run_id
            kept.parent.mkdir(parents=True, exist_ok=True)
            folder = folder.rename(kept)
        self.client.set_terminated(tracker.run_id, "FINISHED")
        return folder

    def fail(self, tracker: RunTracker, status: str, why: str) -> None:
        """Mark a run FAILED or KILLED, with the reason; the reason itself must not be lost to a store that is gone."""
        with contextlib.suppress(MlflowException, OSError):
            tracker.flush()
            tracker.tags({"mmphi.error": why})
            self.client.set_terminated(tracker.run_id, status)

    def address(self, run_id: str) -> str:
        """Where MLflow's pages show a run."""
        base = self.uri if self.uri.startswith("http") else "http://127.0.0.1:5000"
        experiment = self.client.get_run(run_id).info.experiment_id
        return f"{base.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"

    def json_of(self, run: Run, name: str) -> dict[str, Any]:
        """A JSON artifact of a run; empty where there is none."""
        local = self.local_folder(run)
        try:
            path = local / name if local else Path(self.client.download_artifacts(run.info.run_id, name))
            return dict(json.loads(path.read_text()))
        except (OSError, ValueError, MlflowException):
            return {}
