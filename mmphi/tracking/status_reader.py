"""Fast store lookups for ``mmphi status``: a SQLite store is read without importing mlflow.

Importing mlflow takes seconds. MLflow's tables ``runs``, ``tags`` and ``latest_metrics`` have been unchanged since its
first version with SQLite. If reading them fails, and for every other kind of store, MLflow's client is used.
"""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlparse

from mmphi.pipeline.manifest import manifest_holds
from mmphi.tracking.tags import FOR_STUDY, REQUESTED, STUDY
from mmphi.tracking.uri import absolute_uri, database

NEWEST = """
SELECT runs.run_uuid, runs.end_time, runs.artifact_uri FROM runs
JOIN tags ON tags.run_uuid = runs.run_uuid AND tags.key = ? AND tags.value = ?
WHERE runs.lifecycle_stage = 'active' {condition} ORDER BY runs.start_time DESC
"""


MODELS = """
SELECT runs.run_uuid, runs.end_time, runs.name FROM runs
JOIN tags ON tags.run_uuid = runs.run_uuid AND tags.key = 'mmphi.stage' AND tags.value = ?
WHERE runs.lifecycle_stage = 'active' AND runs.status = 'FINISHED' AND {result}
AND (NOT ({trial} OR {for_study}) OR {requested}) {preset} ORDER BY runs.start_time DESC LIMIT ?
"""
HAS = "EXISTS (SELECT 1 FROM tags AS t WHERE t.run_uuid = runs.run_uuid AND t.key = '{}')"
OF_PRESET = (
    "AND EXISTS (SELECT 1 FROM tags AS t WHERE t.run_uuid = runs.run_uuid AND t.key = 'mmphi.preset' AND t.value = ?)"
)


@dataclass(frozen=True)
class ModelRun:
    """A finished run whose result is a model.

    Attributes:
        run_id: ID of the run.
        ended_ms: End time, in milliseconds since 1970.
        name: Name of the run.
    """

    run_id: str
    ended_ms: int
    name: str


@dataclass(frozen=True)
class FinishedRun:
    """The data of a finished run that ``mmphi status`` shows.

    Attributes:
        run_id: ID of the run.
        ended_ms: End time, in milliseconds since 1970.
        folder: Folder of its files; ``None`` if they are not on this machine.
        seconds: Duration; ``None`` if it was not recorded.
    """

    run_id: str
    ended_ms: int
    folder: Path | None
    seconds: float | None


class StatusReader(Protocol):
    """Read access to the runs of a store."""

    uri: str

    def result(self, key: str) -> FinishedRun | None:
        """The newest run that is a result of a key; ``None`` if there is none."""

    def run_status(self, key: str) -> str:
        """MLflow's status of the newest run of a key, such as RUNNING, KILLED or FAILED; empty if there is none."""

    def seconds(self, stage: str, preset: str) -> float | None:
        """Duration in seconds of the newest finished run of a stage with a preset's name; ``None`` if unknown."""

    def models(self, stage: str, preset: str, most: int) -> list[ModelRun]:
        """Newest finished runs of a stage, without those that only a study requested; an empty preset means any."""

    def folder(self, run_id: str) -> Path | None:
        """Folder of a finished run whose files on this machine are complete; ``None`` if no such folder is found."""


class SqliteStatusReader:
    """Reads a SQLite store by SQL.

    Args:
        uri: URI of the store.
        file: Database file.
    """

    def __init__(self, uri: str, file: Path) -> None:
        self.uri, self._file = uri, file

    def _rows(self, query: str, *values: str) -> Iterator[tuple[str, int, str]]:
        if not self._file.exists():
            return
        with contextlib.closing(sqlite3.connect(f"file:{self._file}?mode=ro", uri=True, timeout=10)) as connection:
            yield from connection.execute(query, values)

    def result(self, key: str) -> FinishedRun | None:
        """The newest run that is a result of a key; ``None`` if there is none."""
        finished = NEWEST.format(condition="AND runs.status = 'FINISHED'")
        for run_id, ended_ms, artifacts in self._rows(finished, "mmphi.key", key):
            folder = Path(unquote(urlparse(artifacts).path))
            if manifest_holds(folder):
                return FinishedRun(run_id, ended_ms, folder, self._seconds(run_id))
        return None

    def run_status(self, key: str) -> str:
        """MLflow's status of the newest run of a key, such as RUNNING, KILLED or FAILED; empty if there is none."""
        query = NEWEST.format(condition="").replace("runs.artifact_uri", "runs.status", 1)
        newest = next(self._rows(query, "mmphi.key", key), None)
        return newest[2] if newest else ""

    def seconds(self, stage: str, preset: str) -> float | None:
        """Duration in seconds of the newest finished run of a stage with a preset's name; ``None`` if unknown."""
        named = (
            "AND runs.status = 'FINISHED' AND EXISTS (SELECT 1 FROM tags AS preset"
            " WHERE preset.run_uuid = runs.run_uuid AND preset.key = 'mmphi.preset' AND preset.value = ?)"
        )
        newest = next(self._rows(NEWEST.format(condition=named), "mmphi.stage", stage, preset), None)
        return self._seconds(newest[0]) if newest else None

    def models(self, stage: str, preset: str, most: int) -> list[ModelRun]:
        """Newest finished runs of a stage, without those that only a study requested; an empty preset means any."""
        names = {"result": "mmphi.key", "trial": STUDY, "for_study": FOR_STUDY, "requested": REQUESTED}
        query = MODELS.format(**{k: HAS.format(v) for k, v in names.items()}, preset=OF_PRESET if preset else "")
        rows = self._rows(query, stage, *([preset] if preset else []), str(most))
        return [ModelRun(run_id, ended or 0, name) for run_id, ended, name in rows]

    def folder(self, run_id: str) -> Path | None:
        """Folder of a finished run whose files on this machine are complete; ``None`` if no such folder is found."""
        query = "SELECT run_uuid, 0, artifact_uri FROM runs WHERE run_uuid = ? AND status = 'FINISHED'"
        found = next(self._rows(query, run_id), None)
        address = urlparse(found[2]) if found else None
        if address is None or address.scheme not in ("", "file"):
            return None
        folder = Path(unquote(address.path))
        return folder if manifest_holds(folder) else None

    def _seconds(self, run_id: str) -> float | None:
        query = "SELECT value, 0, '' FROM latest_metrics WHERE run_uuid = ? AND key = 'seconds'"
        row = next(self._rows(query, run_id), None)
        return float(row[0]) if row else None


class ClientStatusReader:
    """Reads any store through MLflow's client."""

    def __init__(self) -> None:
        from mmphi.tracking.run_store import RunStore

        self._store = RunStore()
        self.uri = self._store.uri

    def result(self, key: str) -> FinishedRun | None:
        """The newest run that is a result of a key; ``None`` if there is none."""
        run = next(self._store.results(key), None)
        if run is None:
            return None
        seconds = run.data.metrics.get("seconds")
        return FinishedRun(str(run.info.run_id), run.info.end_time, self._store.local_folder(run), seconds)

    def run_status(self, key: str) -> str:
        """MLflow's status of the newest run of a key, such as RUNNING, KILLED or FAILED; empty if there is none."""
        newest = next(self._store.search(key=key), None)
        return str(newest.info.status) if newest else ""

    def seconds(self, stage: str, preset: str) -> float | None:
        """Duration in seconds of the newest finished run of a stage with a preset's name; ``None`` if unknown."""
        run = next(self._store.search("FINISHED", stage=stage, preset=preset), None)
        return run.data.metrics.get("seconds") if run else None

    def models(self, stage: str, preset: str, most: int) -> list[ModelRun]:
        """Newest finished runs of a stage, without those that only a study requested; an empty preset means any."""
        runs = itertools.islice(self._store.own_results(stage, preset), most)
        return [ModelRun(str(run.info.run_id), run.info.end_time or 0, str(run.info.run_name)) for run in runs]

    def folder(self, run_id: str) -> Path | None:
        """Returns ``None``: use :meth:`mmphi.tracking.run_store.RunStore.model_folder` for such stores."""
        del run_id
        return None


def status_reader() -> StatusReader:
    """Returns a reader for the configured store: by SQL if possible, else through MLflow's client."""
    uri = absolute_uri()
    file = database(uri)
    if file is None:
        return ClientStatusReader()
    looked = SqliteStatusReader(uri, file)
    try:
        looked.seconds("scenes", "tiny")
        looked.run_status("none")
    except sqlite3.Error:
        return ClientStatusReader()
    return looked
