"""Where the tracking store is."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

SQLITE = "sqlite:///"


def absolute_uri() -> str:
    """MLflow's tracking URI from ``MLFLOW_TRACKING_URI``, absolute.

    Where it is not set: ``mlflow.db`` of the current folder if there is one, else of the checkout this package lies in,
    else of the current folder.
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
    """The file of a SQLite store."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


def _database(relative: Path) -> Path:
    """The database that a relative path means.

    ``mlflow run`` passes a relative URI on as it is but starts its command in the project's folder: then the one meant
    is the one that holds the run it began.
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
