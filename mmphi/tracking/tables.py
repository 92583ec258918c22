"""Tables in the form that MLflow's pages show, growing call by call, and gone on with after a kill."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Tables:
    """The rows of a run's tables so far.

    Args:
        folder: The run's; holds the tables that a dead run left for it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: dict[str, list[Row]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def extend(self, name: str, rows: Sequence[Row]) -> bytes:
        """Add rows to a table, and give the whole of it as JSON.

        The first rows of a table decide what of a dead run's stays: rows of the same or a later ``step``, and tables
        without steps, are written again.
        """
        before = self._rows[name] if name in self._rows else self._left(name, rows[0].get("step"))
        self._rows[name] = [*before, *rows]
        columns = list(dict.fromkeys(column for row in self._rows[name] for column in row))
        # MLflow's page shows the first rows: those of the newest step.
        newest = sorted(self._rows[name], key=_step, reverse=True)
        data = [[row.get(column) for column in columns] for row in newest]
        return json.dumps({"columns": columns, "data": data}).encode()

    def _left(self, name: str, step: Any) -> list[Row]:
        try:
            table = json.loads((self.folder / f"{name}.json").read_text())
            rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        except (OSError, ValueError, KeyError):
            return []
        kept = [row for row in rows if step is not None and row.get("step") is not None and row["step"] < step]
        return sorted(kept, key=_step)


def _step(row: Row) -> int:
    return int(row["step"]) if isinstance(row.get("step"), int) else 0


def json_row(row: Mapping[str, Any]) -> Row:
    """A row as JSON knows it."""
    return {str(name): _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
