"""A page that plays recordings beside rows of a table, with nothing else needed to hear them."""

from __future__ import annotations

import base64
import html
import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

AT_MOST, BYTES = 100, 2_000_000  # Recordings that a page plays, and the largest of them.
STYLE = (
    "body{font:15px/1.4 system-ui,sans-serif;margin:1.5rem}table{border-collapse:collapse}"
    "td,th{padding:.4rem .7rem;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}audio{height:2rem}"
)


def audio_page(paths: Sequence[Path], rows: Sequence[Mapping[str, Any]]) -> str:
    """HTML with a player in each row.

    Args:
        paths: The recordings; large ones and all after the first hundred are named, not played.
        rows: What is said of each, in columns that all rows together have.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *columns))
    body = []
    for number, (path, row) in enumerate(zip(paths, rows, strict=True)):
        cells = "".join(f"<td>{html.escape(str(row.get(name, '')))}</td>" for name in columns)
        body.append(f"<tr><td>{_player(path) if number < AT_MOST else ''}</td>{cells}</tr>")
    return (
        f"<!doctype html><meta charset='utf-8'><title>recordings</title><style>{STYLE}</style>"
        f"<table><tr>{head}</tr>{''.join(body)}</table>\n"
    )


def _player(path: Path) -> str:
    if path.stat().st_size > BYTES:
        return ""
    kind = mimetypes.guess_type(path.name)[0] or "audio/mpeg"
    content = base64.b64encode(path.read_bytes()).decode()
    return f"<audio controls preload='none' src='data:{kind};base64,{content}'></audio>"
