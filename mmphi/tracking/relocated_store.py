"""A SQLite store whose folder was moved or copied: MLflow's database holds absolute addresses of its artifacts.

They are rewritten to the database's own folder, once, when the store is opened. MLflow's own pages find the
artifacts then, too, and nothing is written to the folder that the store was copied from.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlparse

from mmphi.tracking.connect import busy_s

FOLDER = "mlruns"
LOCATION = re.compile(rf"(?P<root>.*/{FOLDER})/[^/]+/?")
# Columns that hold addresses of artifacts, as far as a version of MLflow has them.
COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def relocate(file: Path) -> list[str]:
    """Let the addresses in a database follow it, where the artifacts came along or are nowhere else.

    Args:
        file: The database.

    Returns:
        The folders that the addresses led to before; empty where nothing was moved.
    """
    if not file.is_file():
        return []
    here = (file.parent / FOLDER).as_uri()
    with contextlib.closing(sqlite3.connect(file, timeout=busy_s())) as connection, connection:
        try:
            found = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        except sqlite3.Error:  # A new database, or no database: opening it reports that.
            return []
        roots = {match["root"] for (address,) in found if address and (match := LOCATION.fullmatch(str(address)))}
        moved = sorted(root for root in roots if root != here and _followed(root, file.parent / FOLDER))
        for root in moved:
            for table, column in COLUMNS:
                with contextlib.suppress(sqlite3.OperationalError):  # No such table or column.
                    connection.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                        (here, len(root) + 1, len(root) + 1, f"{root}/"),
                    )
    return [unquote(urlparse(root).path) for root in moved]


def _followed(root: str, folder: Path) -> bool:
    """Whether artifacts came along with their database, or are not where it says; else the place is on purpose."""
    parsed = urlparse(root)
    if parsed.scheme not in ("", "file"):
        return False
    before = Path(unquote(parsed.path))
    if not before.is_dir():
        return True
    came = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set()
    return bool(came & {path.name for path in before.iterdir()})
