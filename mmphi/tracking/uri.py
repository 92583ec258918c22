"""Location of the tracking store."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

SQLITE = "sqlite:///"


def absolute_uri() -> str:
    """Returns MLflow's tracking URI from ``MLFLOW_TRACKING_URI``, with an absolute path.

    If it is not set: an existing ``mlflow.db`` in the current folder, else ``mlflow.db`` in the source checkout that
    contains this package, else in the current folder.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        project = Path(__file__).resolve().parents[2]
        here = Path.cwd()
        folder = project if (project / "pyproject.toml").is_file() and not (here / "mlflow.db").exists() else here
        return f"{SQLITE}{folder / 'mlflow.db'}"
    if not uri.startswith(SQLITE) or uri.startswith(f"{SQLITE}/"):
        return uri
    return f"{SQLITE}{_database(Path(uri.removeprefix(SQLITE)))}"


def database(uri: str) -> Path | None:
    """Database file of a SQLite store; ``None`` for other stores."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


def _database(relative: Path) -> Path:
    """Resolve a relative database path.

    ``mlflow run`` passes a relative URI on unchanged, but runs its command in the project's folder. In that case, the
    database is the one that contains the run it created.
    """
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if run_id:
        from mmphi.config.presets import caller_folders

        for folder in (Path.cwd(), *caller_folders()):
            if _holds(folder / relative, run_id):
                return folder / relative
    return Path.cwd() / relative


def _holds(database: Path, run_id: str) -> bool:
    if not database.is_file():
        return False
    try:
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            row = connection.execute("SELECT 1 FROM runs WHERE run_uuid = ?", (run_id,)).fetchone()
    except sqlite3.Error:
        return False
    return row is not None
