"""Tables in the format of MLflow's pages; rows can be appended, also after a run was killed and resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Tables:
    """The rows of a run's tables.

    Args:
        folder: Folder of the run; it may hold tables of the run that it resumes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: dict[str, list[Row]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def extend(self, name: str, rows: Sequence[Row]) -> bytes:
        """Append rows to a table and return the whole table as JSON.

        The first call for a table drops rows of the resumed run that will be recorded again: those of the same or a
        later ``step`` than the first new row, and all rows without steps.
        """
        before = self._rows[name] if name in self._rows else self._left(name, rows[0].get("step"))
        self._rows[name] = [*before, *rows]
        columns = list(dict.fromkeys(column for row in self._rows[name] for column in row))
        # MLflow's page shows only the first rows; the newest steps come first.
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
    """Convert a row to JSON types; non-finite and other values become strings."""
    return {str(name): _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
