"""Self-contained HTML table with an audio player for each recording."""

from __future__ import annotations

import base64
import html
import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

AT_MOST, BYTES = 100, 2_000_000  # Largest number of players in a page, and largest embedded file in bytes.
STYLE = (
    "body{font:15px/1.4 system-ui,sans-serif;margin:1.5rem}table{border-collapse:collapse}"
    "td,th{padding:.4rem .7rem;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}audio{height:2rem}"
)


def audio_page(paths: Sequence[Path], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return an HTML page with a table row and a player for each recording.

    Args:
        paths: Recordings; those over 2 MB and all after the first 100 get no player.
        rows: Table cells of each recording by column name; the columns are the union over all rows.
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
