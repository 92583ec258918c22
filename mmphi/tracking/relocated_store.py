"""Repairs a moved or copied SQLite store: MLflow's database contains absolute artifact paths.

When the store is opened, they are rewritten once to the database's folder. MLflow's pages then find the artifacts, and
nothing is written to the original folder.
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
# Columns with artifact URIs; some exist only in certain versions of MLflow.
COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def relocate(file: Path) -> list[str]:
    """Rewrite artifact paths to the database's folder if the artifacts were moved along or the old folder is gone.

    Args:
        file: Database file.

    Returns:
        The previous artifact folders; empty if nothing was rewritten.
    """
    if not file.is_file():
        return []
    here = (file.parent / FOLDER).as_uri()
    with contextlib.closing(sqlite3.connect(file, timeout=busy_s())) as connection, connection:
        try:
            found = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        except sqlite3.Error:  # A new database or not a database; opening the store reports the latter.
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
    """Whether artifacts were moved along with their database or the old folder is gone; else it is intentional."""
    parsed = urlparse(root)
    if parsed.scheme not in ("", "file"):
        return False
    before = Path(unquote(parsed.path))
    if not before.is_dir():
        return True
    came = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set()
    return bool(came & {path.name for path in before.iterdir()})
