"""The one module that talks to MLflow: the store of runs, and the run that a stage records in.

The store is the only store. A run is the result of its key when it is FINISHED and its manifest holds: every file that
the manifest names is there, with its size and, for all but large files, its digest.
"""

from __future__ import annotations

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import contextlib
import fcntl
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import mlflow
import pandas as pd
import yaml
from mlflow.entities import Metric, Param, Run, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from tqdm.auto import tqdm

from mmphi.errors import StoreError

MANIFEST, LOCK = "manifest.json", ".lock"
DIGEST_LIMIT_BYTES = (
    16 * 1024**2
)  # Larger files are checked by size: digesting gigabytes would cost what caching saves.
EXPERIMENT = "mmphi"


def tracking_uri() -> str:
    """MLflow's tracking URI, absolute: a relative SQLite file would be another one in another folder."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    return uri


class Store:
    """Runs, found by what they are the result of.

    Raises:
        StoreError: If the store cannot be reached.
    """

    def __init__(self, uri: str | None = None) -> None:
        self.uri = uri or tracking_uri()
        os.environ["MLFLOW_TRACKING_URI"] = self.uri
        try:
            self.client = MlflowClient(self.uri)
            self.experiment_id = self._experiment()
        except (MlflowException, OSError) as error:
            raise StoreError(
                f"the tracking store {self.uri} cannot be used: {error}", "check MLFLOW_TRACKING_URI"
            ) from error

    def _experiment(self) -> str:
        run_id = os.environ.get("MLFLOW_RUN_ID")
        if run_id:
            return str(self.client.get_run(run_id).info.experiment_id)
        if os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return os.environ["MLFLOW_EXPERIMENT_ID"]
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = self.client.get_experiment_by_name(name)
        if found:
            return str(found.experiment_id)
        local = self.uri.startswith("sqlite:///")
        root = Path(self.uri.removeprefix("sqlite:///")).parent / "mlruns" / name
        return str(self.client.create_experiment(name, artifact_location=root.as_uri() if local else None))

    def _search(self, text: str) -> list[Run]:
        experiments = [e.experiment_id for e in self.client.search_experiments()]
        return list(self.client.search_runs(experiments, text, order_by=["attributes.start_time DESC"]))

    def result(self, key: str) -> Run | None:
        """The newest run that is a result of ``key``."""
        for run in self._search(f"tags.`mmphi.key` = '{key}' and attributes.status = 'FINISHED'"):
            if "mmphi.reused" not in run.data.tags and self._manifest_holds(run):
                return run
        return None

    def _manifest_holds(self, run: Run) -> bool:
        folder = self.local_folder(run)
        if folder is None:  # A remote store's files are checked when they are fetched.
            return any(f.path == MANIFEST for f in self.client.list_artifacts(run.info.run_id))
        return manifest_holds(folder)

    def seconds_of(self, stage: str, preset: str) -> float | None:
        """How long the newest finished run of a stage took under a preset's name."""
        for run in self._search(f"tags.`mmphi.stage` = '{stage}' and attributes.status = 'FINISHED'"):
            if run.data.tags.get("mmphi.preset") == preset and "seconds" in run.data.metrics:
                return float(run.data.metrics["seconds"])
        return None

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
        folder = self.local_folder(run)
        if folder is not None:
            return folder
        folder = self.work_folder(run.data.tags["mmphi.key"])
        if not manifest_holds(folder):
            self.client.download_artifacts(run.info.run_id, "", str(folder))
            if not manifest_holds(folder):
                raise StoreError(f"the artifacts of run {run.info.run_id} are damaged", "build it anew with --force")
        return folder

    def work_folder(self, key: str) -> Path:
        """Where a key's files are kept on this machine when the store's artifacts are elsewhere."""
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        folder = cache / "mmphi" / "runs" / hashlib.sha256(self.uri.encode()).hexdigest()[:8] / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def start(self, name: str, tags: Mapping[str, str], *, continue_given: bool) -> RunTracker:
        """Begin a run.

        Args:
            name: Readable name.
            tags: ``mmphi.stage``, ``mmphi.key``, ...
            continue_given: Whether to go on in the run that ``mlflow run`` began, where there is one.
        """
        given = os.environ.get("MLFLOW_RUN_ID") if continue_given else None
        if given:
            run = self.client.get_run(given)
            self.client.set_tag(given, "mlflow.runName", name)
        else:
            run = self.client.create_run(self.experiment_id, run_name=name, tags={"mlflow.source.name": "mmphi"})
        for tag, value in tags.items():
            self.client.set_tag(run.info.run_id, tag, value)
        folder = self.local_folder(run) or self.work_folder(tags["mmphi.key"])
        folder.mkdir(parents=True, exist_ok=True)
        return RunTracker(self, run, folder)

    def adopt(self, tracker: RunTracker, key: str) -> None:
        """Move what the newest dead run of ``key`` left into a new run, and say so in both."""
        for run in self._search(f"tags.`mmphi.key` = '{key}' and attributes.status != 'FINISHED'"):
            folder = self.local_folder(run)
            if run.info.run_id == tracker.run_id or folder is None or not folder.is_dir():
                continue
            with locked(folder) as free:
                if not free:
                    raise StoreError(
                        f"run {run.info.run_id} is building the same result right now", "wait for it, or stop it"
                    )
                left = [p for p in folder.iterdir() if p.name not in (LOCK, MANIFEST)]
                for path in left:
                    target = tracker.folder / path.name
                    if not target.exists():
                        path.rename(target)
            if run.info.status == "RUNNING":
                self.client.set_terminated(run.info.run_id, "KILLED")
            if left:
                self.client.set_tag(run.info.run_id, "mmphi.continued_by", tracker.run_id)
                tracker.tags({"mmphi.continues": run.info.run_id})
                return


class RunTracker:
    """Records in one run; fulfils :class:`mmphi.stage.Tracker`."""

    def __init__(self, store: Store, run: Run, folder: Path) -> None:
        self.store, self.run, self.folder = store, run, folder
        self.remote = store.local_folder(run) is None

    @property
    def run_id(self) -> str:
        """Id of the run."""
        return str(self.run.info.run_id)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record numbers at a step."""
        now = int(time.time() * 1000)
        found = [Metric(name, float(value), now, step) for name, value in values.items()]
        if found:
            self.store.client.log_batch(self.run_id, metrics=found)

    def params(self, values: Mapping[str, Any]) -> None:
        """Record settings; an empty value is written as ``(none)``, because MLflow refuses it."""
        found = [Param(name, str(value)[:6000] or "(none)") for name, value in values.items()]
        for first in range(0, len(found), 100):
            self.store.client.log_batch(self.run_id, params=found[first : first + 100])

    def tags(self, values: Mapping[str, str]) -> None:
        """Record tags."""
        self.store.client.log_batch(self.run_id, tags=[RunTag(k, str(v)[:5000]) for k, v in values.items()])

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], image: str = "") -> None:
        """Record rows as a table; paths in the column ``image`` become pictures that the UI shows."""
        if not rows:
            return
        columns: dict[str, list[Any]] = {key: [row[key] for row in rows] for key in rows[0]}
        if image:
            columns[image] = [_small_picture(path) for path in columns[image]]
        self.store.client.log_table(self.run_id, columns, f"{name}.json")
        if not image:
            self.text(f"{name}.csv", pd.DataFrame(columns).to_csv(index=False))

    def figure(self, name: str, figure: Any) -> None:
        """Record a matplotlib figure or a PIL image as ``figures/name.png``."""
        if hasattr(figure, "savefig"):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"{name}.png"
                figure.savefig(path, dpi=100)
                self.store.client.log_artifact(self.run_id, str(path), "figures")
        else:
            self.store.client.log_image(self.run_id, figure, f"figures/{name}.png")

    def text(self, name: str, content: str) -> None:
        """Record a text file."""
        self.store.client.log_text(self.run_id, content, name)

    def say(self, line: str) -> None:
        """Print a line without tearing a progress bar."""
        tqdm.write(line)

    def yaml(self, name: str, content: Any) -> None:
        """Record a YAML file."""
        self.text(name, yaml.safe_dump(content, sort_keys=False))

    def finish(self) -> None:
        """Write the manifest, last of all files, and mark the run FINISHED."""
        if self.remote:
            self.store.client.log_artifacts(self.run_id, str(self.folder))
            self.store.client.download_artifacts(self.run_id, "", str(self.folder))
        write_manifest(self.folder)
        if self.remote:
            self.store.client.log_artifact(self.run_id, str(self.folder / MANIFEST))
        self.store.client.set_terminated(self.run_id, RunStatus.to_string(RunStatus.FINISHED))

    def fail(self, status: str, why: str) -> None:
        """Mark the run FAILED or KILLED, with the reason."""
        self.tags({"mmphi.error": why})
        self.store.client.set_terminated(self.run_id, status)


class SilentTracker:
    """Records nothing: for all but the first of the processes that train together."""

    run_id = ""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Do nothing."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], image: str = "") -> None:
        """Do nothing."""

    def figure(self, name: str, figure: Any) -> None:
        """Do nothing."""

    def text(self, name: str, content: str) -> None:
        """Do nothing."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Do nothing."""

    def say(self, line: str) -> None:
        """Do nothing."""


def _small_picture(path: Any) -> Any:
    """A picture of at most 256 px, as MLflow's tables hold it."""
    from mmphi.data.images import open_image

    picture = open_image(Path(path))
    picture.thumbnail((256, 256))
    return mlflow.Image(picture)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (MANIFEST, LOCK))


def write_manifest(folder: Path) -> None:
    """List every file of a finished result with its size and digest."""
    listed = {p.relative_to(folder).as_posix(): [p.stat().st_size, _digest(p)] for p in _files(folder)}
    part = folder / f"{MANIFEST}.part"
    part.write_text(json.dumps(listed, indent=1))
    part.rename(folder / MANIFEST)


def manifest_holds(folder: Path) -> bool:
    """Whether every listed file is there, whole."""
    try:
        listed = json.loads((folder / MANIFEST).read_text())
        return all(
            (folder / name).stat().st_size == size and (not digest or _digest(folder / name) == digest)
            for name, (size, digest) in listed.items()
        )
    except (OSError, ValueError):
        return False


def _digest(path: Path) -> str:
    if path.stat().st_size > DIGEST_LIMIT_BYTES:
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock; yields whether it was free. A process that dies lets go of it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def clear(folder: Path) -> None:
    """Remove everything in a folder but its lock."""
    for path in folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
