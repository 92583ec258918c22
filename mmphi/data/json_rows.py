"""Reads JSON and JSON Lines files in UTF-8 or UTF-16."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmphi.errors import DataError

UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
LINES = (".jsonl", ".ndjson")


def text_of(path: Path) -> str:
    """Returns the text of a file, decoded as UTF-16 if it has that byte order mark, else as UTF-8.

    Raises:
        DataError: If the file cannot be read, or has another encoding; the message gives the line.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder, not a file of rows", "a source of kind `datasets` reads folders")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "check the path in data.sources") from error
    encoding = "utf-16" if content.startswith(UTF16) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: not {encoding.removesuffix('-sig').upper()} ({error.reason})",
            "save the file as UTF-8; in Excel as `CSV UTF-8`",
        ) from error


def load_json(path: Path) -> Any:
    """Read a JSON file; JSON Lines are returned as a list.

    Raises:
        DataError: If the file is missing, has an unknown encoding or is malformed; the message gives the position.
    """
    text = text_of(path)
    try:
        return json.loads(text) if path.suffix.lower() not in LINES else _lines(text, path)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip()[:1] == "{":
            return _lines(text, path)
        raise _malformed(path, error.lineno, error) from error
    except (ValueError, RecursionError) as error:  # A number with thousands of digits, or thousands of nested brackets.
        raise DataError(f"{path} cannot be read: {error}", "such a file holds no conversations") from error


def _lines(text: str, path: Path) -> list[Any]:
    """Values of a JSON Lines text."""
    return list(_values(text, path))


def _values(text: str, path: Path) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise _malformed(path, number, error) from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: {error}", "such a line holds no conversation") from error


def _malformed(path: Path, line: int, error: json.JSONDecodeError) -> DataError:
    hint = "correct the file there, or fetch it again; a list and JSON Lines are read"
    return DataError(f"{path}, line {line}, column {error.colno}: {error.msg}", hint)
