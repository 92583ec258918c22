"""Persistent cache of transcripts, shared by all processes of a user; deleting it only costs time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mmphi.config.audio import AudioSettings
from mmphi.data.content_hash import cache_folder
from mmphi.models.audio.transcription import Segment, Transcript

FORMAT = 1  # Increased when the way in which Whisper is called changes.
# Settings that change a transcript, by their names in cache keys.
KEY_SETTINGS = {
    **{name: name for name in ("backend", "language", "prompt")},
    **{"threshold": "vad_threshold", "window": "max_chunk_s", "beam": "beam_size"},
}
AT_ONCE = 500
UNAVAILABLE = (  # Primary result codes of SQLite that say nothing about the file's content.
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL),
    *(sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN),
)


class TranscriptCache:
    """Transcripts of one Whisper with fixed settings, by the content of recordings.

    Args:
        whisper: Digest of Whisper's weights.
        settings: Settings of the transcription.
        path: SQLite file; by default one that all processes of this user share.
    """

    def __init__(self, whisper: str, settings: AudioSettings, path: Path | None = None) -> None:
        how = {key: getattr(settings, name) for key, name in KEY_SETTINGS.items()}
        self._whose = hashlib.sha256(json.dumps([FORMAT, whisper, how]).encode()).hexdigest()
        self._path = path or cache_folder() / "transcripts.sqlite"

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(self._path, timeout=30)) as connection, connection:
            connection.execute("CREATE TABLE IF NOT EXISTS transcripts (key TEXT PRIMARY KEY, content TEXT)")
            yield connection

    def recall(self, contents: Sequence[str]) -> dict[str, Transcript]:
        """Cached transcripts by the digest of the recording's content; recordings without one are omitted."""
        found: dict[str, Transcript] = {}
        with contextlib.suppress(OSError, sqlite3.Error, ValueError, KeyError, TypeError), self._open() as connection:
            for first in range(0, len(contents), AT_ONCE):
                keys = [f"{self._whose}/{content}" for content in contents[first : first + AT_ONCE]]
                marks = ",".join("?" * len(keys))
                rows = connection.execute(f"SELECT key, content FROM transcripts WHERE key IN ({marks})", keys)
                for key, text in rows:
                    row = json.loads(text)
                    segments = tuple(Segment(*segment) for segment in row["segments"])
                    found[key.rpartition("/")[2]] = Transcript(segments, row["language"])
        return found

    def remember(self, transcripts: Mapping[str, Transcript]) -> None:
        """Store transcripts by the digest of the recording's content, except those of defective recordings."""
        rows = [
            (
                f"{self._whose}/{content}",
                json.dumps({"segments": [[s.start, s.end, s.text] for s in each.segments], "language": each.language}),
            )
            for content, each in transcripts.items()
            if not each.defects
        ]
        try:
            with self._open() as connection:
                connection.executemany("INSERT OR REPLACE INTO transcripts VALUES (?, ?)", rows)
        except OSError:
            pass
        except sqlite3.DatabaseError as error:
            # Other processes use a file that is locked or on a full disk; any other file is replaced by the next call.
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in UNAVAILABLE:
                with contextlib.suppress(OSError):
                    self._path.unlink()
