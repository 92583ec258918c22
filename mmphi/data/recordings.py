"""A CSV of recordings, and what is said in them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmphi.data.images import resolve_inside
from mmphi.data.records import ReadReport
from mmphi.errors import DataError, ImageError

SOURCE = "recordings"


@dataclass(frozen=True)
class Spoken:
    """A recording and what is said in it.

    Attributes:
        name: Its path as the CSV says it.
        path: Where the file lies.
        text: What is said, as somebody wrote it down; ``None`` where nobody did.
    """

    name: str
    path: Path
    text: str | None = None


def read_recordings(
    path: Path, folder: Path, report: ReadReport, *, audio_column: str = "audio", text_column: str = "transcript"
) -> Iterator[Spoken]:
    """Read a CSV with a header, one recording a row.

    Args:
        path: The CSV.
        folder: What the paths in it are relative to; none may lead out of it.
        report: Counts rows that cannot be used.
        audio_column: Of the recording's path.
        text_column: Of what is said; a CSV without it has recordings to transcribe, and no error rate.

    Raises:
        DataError: If the file cannot be read or lacks the column of recordings.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            if audio_column not in (rows.fieldnames or ()):
                have = ", ".join(rows.fieldnames or ()) or "nothing"
                raise DataError(
                    f"{path} has no column {audio_column!r}; it has {have}",
                    "name its column in transcribe.audio_column",
                )
            for row in rows:
                where = f"{path.name}, line {rows.line_num}"
                name = row[audio_column]
                if not name or None in row:
                    report.drop(SOURCE, where, "malformed row")
                    continue
                try:
                    found = resolve_inside(folder, name)
                except ImageError as error:
                    report.drop(SOURCE, where, error.reason.replace("image", "recordings'"))
                    continue
                if not found.is_file():
                    report.drop(SOURCE, where, "missing")
                    continue
                report.keep(SOURCE)
                yield Spoken(name, found, row.get(text_column))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", "save it as CSV in UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "check the path in transcribe.path") from error
