"""Content digests of files and folders, cached by size and modification time.

The cache only saves time: without it, files are read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmphi.errors import SettingsError

RACY_S = 2.0  # A file written this recently may change again within the resolution of its modification time.
FEW = 1000  # Folders with up to this many files, such as models, are checked file by file every time.
BAR_FROM = 1000  # Minimum number of files for a progress bar.


def cache_folder() -> Path:
    """Returns the user's cache folder of mmphi."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmphi"


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(source: Path | bytes) -> str:
    """Returns the SHA-256 of bytes or of a file's current content; the path if the file does not exist."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    return Digests().of(source) if source.is_file() else str(source)


class Digests:
    """SHA-256 of files and folders.

    Args:
        memory: SQLite file of the cache; by default one that all processes of the user share.
    """

    def __init__(self, memory: Path | None = None) -> None:
        self._memory = memory or cache_folder() / "digests.sqlite"

    def of(self, path: Path) -> str:
        """Returns the SHA-256 of a file's content, or of the names and contents of all files in a folder.

        A folder of more than :data:`FEW` files is read again only if files or folders in it were added, removed or
        renamed, which changes the modification times of its folders. A file there that is overwritten in place is not
        detected until the modification time of a folder changes.

        Raises:
            SettingsError: If the file or folder cannot be read.
        """
        path = path.resolve()
        try:
            digest = self.of_files([path]).get(path) if path.is_file() else self._of_folder(path)
        except OSError as error:
            raise SettingsError(f"{path} cannot be read: {error.strerror}", "check that you may read it") from error
        if digest is None:
            raise SettingsError(f"{path} cannot be read", "check that you may read it")
        return digest

    def of_files(self, paths: Iterable[Path], title: str = "digests") -> dict[Path, str]:
        """Returns the SHA-256 of each file; unreadable files are left out.

        Files that are not in the cache are read in parallel, with a progress bar if there are many.
        """
        looks = {path: look for path in dict.fromkeys(paths) if (look := _look(path))}
        known = self._recall(map(str, looks))
        digests = {p: known[str(p)][1] for p, look in looks.items() if known.get(str(p), ("", ""))[0] == look}
        missing = [path for path in looks if path not in digests]
        read = {p: d for p, d in zip(missing, _read(missing, title), strict=True) if d}
        self._remember({str(p): (looks[p], d) for p, d in read.items() if not _fresh([p])})
        return digests | read

    def _of_folder(self, folder: Path) -> str:
        folders = sorted(Path(path) for path, _, _ in os.walk(folder, followlinks=False))
        look = hashlib.sha256("".join(f"{f}\0{_look(f)}\0" for f in folders).encode()).hexdigest()
        known = self._recall([f"{folder}/"]).get(f"{folder}/")
        if known and known[0].partition(" ")[0] == look and int(known[0].partition(" ")[2] or 0) > FEW:
            return known[1]
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        digests = self.of_files(files, title=f"reading {folder.name}")
        whole = hashlib.sha256()
        for path in files:
            whole.update(path.relative_to(folder).as_posix().encode() + b"\0" + digests.get(path, "").encode())
        if not _fresh([*folders, *files]):
            self._remember({f"{folder}/": (f"{look} {len(files)}", whole.hexdigest())})
        return whole.hexdigest()

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(self._memory, timeout=30)) as connection, connection:
            connection.execute("CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, look TEXT, digest TEXT)")
            yield connection

    def _recall(self, paths: Iterable[str]) -> dict[str, tuple[str, str]]:
        wanted, known = list(paths), {}
        with contextlib.suppress(OSError, sqlite3.Error), self._open() as connection:
            for first in range(0, len(wanted), 500):
                part = wanted[first : first + 500]
                marks = ",".join("?" * len(part))
                rows = connection.execute(f"SELECT path, look, digest FROM digests WHERE path IN ({marks})", part)
                known.update({path: (look, digest) for path, look, digest in rows})
        return known

    def _remember(self, entries: Mapping[str, tuple[str, str]]) -> None:
        if not entries:
            return
        rows = [(path, look, digest) for path, (look, digest) in entries.items()]
        try:
            with self._open() as connection:
                connection.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?)", rows)
        except sqlite3.DatabaseError:  # Corrupt, or not a database: the next call creates a new one.
            with contextlib.suppress(OSError):
                self._memory.unlink()
        except OSError:
            pass


def _look(path: Path) -> str:
    """Size and modification time of a file, to detect changes; empty if it cannot be read."""
    try:
        stat = path.stat()
    except OSError:
        return ""
    return f"{stat.st_size}/{stat.st_mtime_ns}"


def _digest_or_nothing(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError:
        return ""


def _fresh(paths: Iterable[Path]) -> bool:
    now = time.time()
    return any(now - path.stat().st_mtime < RACY_S for path in paths)


def _read(paths: list[Path], title: str) -> Iterator[str]:
    if len(paths) < 2:
        return map(_digest_or_nothing, paths)
    from tqdm.auto import tqdm

    def each() -> Iterator[str]:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            digests = pool.map(_digest_or_nothing, paths, chunksize=16)
            yield from tqdm(digests, total=len(paths), desc=title, unit="file", disable=len(paths) < BAR_FROM)

    return each()


class FileDigests:
    """Digests of the files that one process works with.

    Files of a dataset are prepared: their digests are computed once, because they do not change during its use. Any
    other file is checked at each access, because it may have been overwritten.

    Args:
        digests: Persistent cache of digests.
    """

    def __init__(self, digests: Digests | None = None) -> None:
        self._digests = digests or Digests()
        self._prepared: dict[Path, str] = {}

    def prepare(self, paths: Iterable[Path], title: str = "digests") -> None:
        """Look up the digests of many files at once."""
        missing = [path for path in dict.fromkeys(paths) if path not in self._prepared]
        self._prepared.update(dict.fromkeys(missing, "") | self._digests.of_files(missing, title))

    def __getitem__(self, path: Path) -> str:
        """SHA-256 of a file; empty if it cannot be read."""
        if (prepared := self._prepared.get(path)) is not None:
            return prepared
        return self._digests.of_files([path]).get(path, "")
