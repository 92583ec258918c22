"""Runs in the tracking store. A run is a result of its cache key if it is FINISHED and its manifest is valid."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from filelock import FileLock
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException

from mmphi.data.content_hash import cache_folder
from mmphi.errors import StoreError
from mmphi.logs import LOGGER
from mmphi.pipeline.manifest import MANIFEST, manifest_holds
from mmphi.tracking.artifacts import fetch_result
from mmphi.tracking.connect import connect
from mmphi.tracking.logged_model import logged_model
from mmphi.tracking.relocated_store import relocate
from mmphi.tracking.tags import FOR_STUDY, REQUESTED, STUDY
from mmphi.tracking.uri import absolute_uri, database

if TYPE_CHECKING:
    from mmphi.pipeline.stage import Result

EXPERIMENT = "mmphi"
KIND, TRAINING = "mlflow.experimentKind", "custom_model_development"
GENERATED_NAME = re.compile(r"[a-z]+-[a-z]+-\d+")  # Pattern of MLflow's generated run names.
MISSING = "RESOURCE_DOES_NOT_EXIST"
PAGE = 5  # Size of a search's first page: the newest run is nearly always the one needed, and longer pages cost time.


class RunStore:
    """Finds runs by cache key, stage or ID, and the files of their results.

    Args:
        uri: MLflow's tracking URI; by default :func:`absolute_uri`.

    Raises:
        StoreError: If the store cannot be reached.
    """

    def __init__(self, uri: str | None = None) -> None:
        self.uri = uri or absolute_uri()
        self.cache = cache_folder() / hashlib.sha256(self.uri.encode()).hexdigest()[:8]
        file = database(self.uri)
        self._chosen_experiment = ""
        self.locks = file.parent / "mlruns" / ".locks" if file else self.cache / "locks"
        self.locks.mkdir(parents=True, exist_ok=True)
        with FileLock(self.locks / "database.lock"):  # Two processes must not create the tables at the same time.
            for before in relocate(file) if file else ():
                LOGGER.warning(f"{self.uri} was in {before} before: its artifacts are now expected in its own folder")
            self.client = connect(self.uri)

    def run(self, run_id: str) -> Run:
        """Returns a run by its ID.

        Raises:
            StoreError: If it is not in this store.
        """
        try:
            return self.client.get_run(run_id)
        except MlflowException as error:
            raise StoreError(
                f"{self.uri} has no run {run_id}", "check the id and MLFLOW_TRACKING_URI, which must be absolute"
            ) from error

    def run_if_there(self, run_id: str) -> Run | None:
        """Returns a run by its ID; ``None`` if it was permanently removed, as by `mlflow gc`.

        Raises:
            MlflowException: If the store fails for another reason.
        """
        try:
            return self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == MISSING:
                return None
            raise

    def experiment(self) -> str:
        """ID of the experiment to record in, created if missing.

        It is that of :meth:`record_in_experiment_of`, else of ``MLFLOW_EXPERIMENT_ID`` or ``MLFLOW_EXPERIMENT_NAME``,
        else ``mmphi``.

        Raises:
            StoreError: If the experiment was deleted.
        """
        if self._chosen_experiment:
            return self._chosen_experiment
        if os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return os.environ["MLFLOW_EXPERIMENT_ID"]
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        known = self.client.get_experiment_by_name(name)
        if known and known.lifecycle_stage == "deleted":
            command = f"mlflow experiments restore --experiment-id {known.experiment_id}"
            raise StoreError(
                f"the experiment {name} is deleted", f"{command}, or name another in MLFLOW_EXPERIMENT_NAME"
            )
        if known:
            return str(known.experiment_id)
        file = database(self.uri)
        root = (file.parent / "mlruns" / re.sub(r"[^\w.-]", "_", name)).as_uri() if file else None
        # Without this tag, MLflow's pages show an experiment with tables as an evaluation of agents.
        tags = {KIND: TRAINING}
        return str(self.client.create_experiment(name, artifact_location=root, tags=tags))

    def record_in_experiment_of(self, run_id: str, title: str) -> None:
        """Record new runs in the experiment of an existing run.

        ``mlflow run`` creates a run with a random name, in an experiment without a kind, minutes before the stage
        starts. This method sets the run's name and the experiment's kind immediately.

        Args:
            run_id: ID of the existing run.
            title: New name of the run; a name chosen by a user is kept.

        Raises:
            StoreError: If the run is not in this store.
        """
        run = self.run(run_id)
        self._chosen_experiment = str(run.info.experiment_id)
        if GENERATED_NAME.fullmatch(run.info.run_name or ""):
            self.client.update_run(run_id, name=title)
        if KIND not in self.client.get_experiment(self._chosen_experiment).tags:
            self.client.set_experiment_tag(self._chosen_experiment, KIND, TRAINING)

    def search(self, status: str = "", **tags: str) -> Iterator[Run]:
        """Yield runs of all experiments with the given tags, newest first.

        Args:
            status: Only runs with this status, such as ``FINISHED``; empty for any.
            **tags: Required tags without the prefix ``mmphi.``: ``key=...`` stands for ``mmphi.key``.
        """
        experiments = [str(e.experiment_id) for e in self._experiments()]
        conditions = [f"tags.`mmphi.{name}` = '{value}'" for name, value in tags.items()]
        text = " and ".join([*conditions, *([f"attributes.status = '{status}'"] if status else [])])
        token: str | None = None
        for number in itertools.count():
            size = PAGE if number == 0 else 1000
            page = self.client.search_runs(
                experiments, text, max_results=size, order_by=["attributes.start_time DESC"], page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return

    def _experiments(self) -> Iterator[Any]:
        token: str | None = None
        while True:
            page = self.client.search_experiments(page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def newest(self, stage: str) -> Run | None:
        """The newest finished run of a stage, with any key; ``None`` if there is none."""
        runs = self.search("FINISHED", stage=stage)
        return next((run for run in runs if "mmphi.key" in run.data.tags), None)

    def own_results(self, stage: str, preset: str = "") -> Iterator[Run]:
        """Finished runs of a stage, newest first, without runs that exist only because of a study.

        Args:
            stage: Name of the stage.
            preset: Only runs of this preset; empty for all.
        """
        runs = self.search("FINISHED", stage=stage, **({"preset": preset} if preset else {}))
        return (run for run in runs if "mmphi.key" in run.data.tags and not _is_of_study(run))

    def results(self, key: str) -> Iterator[Run]:
        """Runs that are results of a key, newest first."""
        return (run for run in self.search("FINISHED", key=key) if self.is_result(run))

    def is_result(self, run: Run) -> bool:
        """Whether a run is FINISHED and its manifest is valid; other programs may set the status too."""
        if run.info.status != "FINISHED":
            return False
        folder = self.local_folder(run)
        # Files of a remote store are verified when they are fetched.
        return manifest_holds(folder) if folder is not None else self.has_manifest(run)

    def has_manifest(self, run: Run) -> bool:
        """Whether a run has a manifest, that is, whether its files were complete at some time."""
        folder = self.local_folder(run)
        if folder is not None:
            return (folder / MANIFEST).exists()
        return any(f.path == MANIFEST for f in self.client.list_artifacts(run.info.run_id))

    def local_folder(self, run: Run) -> Path | None:
        """Folder of a run's artifacts; ``None`` if they are not on this machine."""
        parsed = urlparse(run.info.artifact_uri)
        if parsed.scheme == "file":
            return Path(unquote(parsed.path))
        return Path(run.info.artifact_uri) if not parsed.scheme else None

    def fetch(self, run: Run) -> Path:
        """Folder of a finished run's artifacts on this machine; downloaded once if the store is remote.

        Raises:
            StoreError: If the artifacts cannot be downloaded or do not match the manifest.
        """
        local = self.local_folder(run)
        return local if local is not None else fetch_result(self.client, str(run.info.run_id), self.cache / "runs")

    def model_folder(self, name: str) -> Path:
        """Returns the folder of a model.

        Args:
            name: A folder, the ID of a run, ``runs:/ID``, or a registered model (``models:/NAME/VERSION``,
                ``models:/NAME@ALIAS``).

        Raises:
            StoreError: If there is no model of that name.
        """
        if Path(name).expanduser().is_dir():
            return Path(name).expanduser().absolute()
        run_id = (
            self._registered(name) if name.startswith("models:/") else name.removeprefix("runs:/").partition("/")[0]
        )
        return self.fetch(self.run(run_id))

    def _registered(self, name: str) -> str:
        model, at, alias = name.removeprefix("models:/").partition("@")
        model, _, version = model.partition("/")
        try:
            if at:
                registered = self.client.get_model_version_by_alias(model, alias)
            elif version and version != "latest":
                registered = self.client.get_model_version(model, version)
            else:
                registered = max(self.client.search_model_versions(f"name='{model}'"), key=lambda v: int(v.version))
        except (MlflowException, ValueError) as error:
            raise StoreError(
                f"{self.uri} has no registered model {name}", "give models:/NAME/VERSION, or the id of a run"
            ) from error
        return str(registered.run_id)

    def note_use(self, run_id: str, *, own: bool = False) -> None:
        """Record in a result's tags that it is used now.

        Args:
            run_id: Run ID of the result.
            own: Whether a user requested this result directly, so that it no longer belongs to a study only.
        """
        if own:
            self.client.set_tag(run_id, REQUESTED, "true")
        self.client.set_tag(run_id, "mmphi.last_used", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    def add_metrics(self, run_id: str, after: Result, own: Mapping[str, float]) -> None:
        """Copy the metrics of a follow-up stage to a result's run, once.

        Args:
            run_id: Run ID of the result.
            after: Result of the follow-up stage.
            own: Metrics of the result; those names are not overwritten.
        """
        tag = f"mmphi.then.{after.stage}"
        if self.run(run_id).data.tags.get(tag) == after.run_id:
            return
        now = int(time.time() * 1000)
        model = logged_model(self.run(run_id)) or None
        metrics = [
            Metric(name, float(value), now, 0, model_id=model, run_id=run_id)
            for name, value in after.metrics.items()
            if name not in own
        ]
        self.client.log_batch(run_id, metrics=metrics)
        self.client.set_tag(run_id, tag, after.run_id)

    def address(self, run_id: str) -> str:
        """URL of a run on MLflow's pages."""
        experiment = self.client.get_run(run_id).info.experiment_id
        # Without the workflow type, MLflow 3 shows its sidebar for agents.
        return f"{self.pages}/#/experiments/{experiment}/runs/{run_id}?workflowType=machine_learning"

    @property
    def pages(self) -> str:
        """URL of MLflow's pages: the tracking server's, else ``MMPHI_UI``, by default that of ``mmphi ui``."""
        base = self.uri if self.uri.startswith("http") else os.environ.get("MMPHI_UI", "http://127.0.0.1:5000")
        return base.rstrip("/")

    def json_of(self, run: Run, name: str) -> dict[str, Any]:
        """Returns a JSON artifact of a run; empty if it does not exist or cannot be read."""
        local = self.local_folder(run)
        with contextlib.suppress(OSError, ValueError, MlflowException):
            path = local / name if local else Path(self.client.download_artifacts(run.info.run_id, name))
            return dict(json.loads(path.read_text()))
        return {}


def _is_of_study(run: Run) -> bool:
    """Whether a run exists only because of a study."""
    return bool({STUDY, FOR_STUDY} & set(run.data.tags)) and REQUESTED not in run.data.tags
