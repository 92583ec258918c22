"""Reads texts of any size from files, folders and datasets in pieces; unreadable parts are counted and reported."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import zstandard

from mmphi.data.compressed_io import HEAD, open_compressed, plain_name
from mmphi.data.hf_datasets import load_rows
from mmphi.errors import DataError

SUFFIXES = (".txt", ".md", ".rst", ".jsonl")  # Files read from a folder; a .json file there is rarely a text.
ROWS, TABLE = (".jsonl", ".json"), ".parquet"
PIECE = 1 << 18  # Maximum characters of a piece, which is tokenized as one text.
BLOCK = 1 << 22  # Bytes read from a file at once.
MARK = "\ufeff"  # Byte order mark.
SAFE_CUT = re.compile(r"(?<=\S)(?:\n(?=\S)|(?= \S))")
"""Positions where a text can be cut without changing its tokens: after a single newline between words, or before a
single space, which GPT-2's pattern joins with the following word."""
BOMS: tuple[tuple[bytes, str], ...] = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
)
BOMS += ((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


class TextPiece(NamedTuple):
    """A part of a document.

    Attributes:
        text: Text of the part.
        first: Whether the part begins the document.
        last: Whether the part ends the document.
    """

    text: str
    first: bool
    last: bool


@dataclass
class TextReport:
    """Counts of what was read from a source, and what was skipped.

    Attributes:
        documents: Number of documents read.
        characters: Number of characters in them.
        skipped: Number of skipped files or rows, by reason.
        examples: Location of one skipped file or row, by reason.
        cut: Number of pieces cut inside a word, because the word was too long.
    """

    documents: int = 0
    characters: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    cut: int = 0

    def skip(self, reason: str, where: str) -> None:
        """Count a file or row that cannot be used."""
        self.skipped[reason] += 1
        self.examples.setdefault(reason, where)

    def lines(self) -> Iterator[str]:
        """Yields a description of what was skipped."""
        for reason, count in self.skipped.most_common():
            yield f"{count} skipped: {reason}, such as {self.examples[reason]}"
        if self.cut:
            yield f"{self.cut} pieces were cut inside a word longer than {PIECE // 2:,} characters"


def files_of(path: Path) -> list[Path]:
    """Returns the text files of a file or folder, sorted by path."""
    if path.is_file():
        return [path]
    there = (p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith("."))
    return [p for p in there if plain_name(p).endswith(SUFFIXES)]


def is_dataset(path: str) -> bool:
    """Whether `datasets` reads a source: a hub name, its own folder, a Parquet file or a folder of Parquet files."""
    folder = Path(path)
    if not folder.exists():
        return True
    if not folder.is_dir():
        return folder.suffix == TABLE
    written = ("dataset_info.json", "dataset_dict.json")
    return any((folder / name).exists() for name in written) or (
        not files_of(folder) and any(folder.rglob("*.parquet"))
    )


def read_texts(
    path: str,
    report: TextReport,
    *,
    kind: str = "auto",
    column: str = "text",
    separator: str = "",
    encoding: str = "",
    split: str = "train",
    revision: str = "",
) -> Iterator[TextPiece]:
    """Yields the documents of a source, cut into pieces that can be tokenized one by one.

    Args:
        path: File, folder, or name of a dataset.
        report: Counts what was read.
        kind: ``text``, ``jsonl`` (also a JSON list of rows or texts) or ``datasets`` (also a Parquet file); ``auto``
            depends on the name.
        column: Column of the text in rows.
        separator: Separator of the documents in a text file; if empty, each file is one document.
        encoding: Encoding of files; if empty, that of the byte order mark, else UTF-8.
        split: Split of a dataset.
        revision: Revision of a hub dataset.

    Raises:
        DataError: If the source does not exist or has no texts, or a dataset lacks the column.
    """
    if kind == "datasets" or (kind == "auto" and is_dataset(path)):
        rows = load_rows(path, split, revision)
        if column not in rows.column_names:
            raise DataError(
                f"{path} has no column {column!r}; it has {', '.join(rows.column_names)}", "name its column"
            )
        for number, row in enumerate(rows.select_columns([column]), 1):
            yield from _document(row[column], f"{path}, row {number}", report)
        return
    files = files_of(Path(path))
    if not files:
        raise DataError(f"{path} has no texts", f"texts end in {', '.join(SUFFIXES)}, each also with .gz or .zst")
    for file in files:
        as_rows = kind == "jsonl" or (kind == "auto" and plain_name(file).endswith(ROWS))
        try:
            with open_compressed(file) as stream:
                found = _encoding(stream, encoding, file, report)
                if found and as_rows:
                    yield from _rows(stream, file, column, found, report)
                elif found:
                    yield from _text(stream, file, separator, found, report)
        except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
            report.skip(f"a damaged or truncated {file.suffix} file, or the rest of it", f"{file}: {error}")


def _encoding(stream: IO[bytes], declared: str, file: Path, report: TextReport) -> str:
    """Encoding of a file; empty if it cannot be read, which is counted."""
    head: bytes = stream.peek(HEAD)[:HEAD]  # type: ignore[attr-defined]  # Buffered files and GzipFile have it.
    if not head.strip():
        report.skip("empty", str(file))
        return ""
    found = declared or next((name for bom, name in BOMS if head.startswith(bom)), "")
    if not found and b"\0" in head:
        report.skip("binary, not text", str(file))
        return ""
    try:
        codecs.getincrementaldecoder(found or "utf-8")().decode(head)
    except (UnicodeDecodeError, LookupError):
        report.skip("unknown encoding (set corpus.sources.N.encoding)", str(file))
        return ""
    return found or "utf-8"


def _rows(stream: IO[bytes], file: Path, column: str, encoding: str, report: TextReport) -> Iterator[TextPiece]:
    rows = _list(stream, file, encoding, report) if plain_name(file).endswith(".json") else None
    for where, row in _lines(stream, file, encoding, report) if rows is None else rows:
        if rows is not None and isinstance(row, str):  # A list of texts.
            yield from _document(row, where, report)
        elif not isinstance(row, dict) or column not in row:
            has = f" (it has {', '.join(list(map(str, row))[:8])})" if isinstance(row, dict) and row else ""
            report.skip(f"a row without {column!r}{has}", where)
        else:
            yield from _document(row[column], where, report)


def _lines(stream: IO[bytes], file: Path, encoding: str, report: TextReport) -> Iterator[tuple[str, Any]]:
    """Locations and rows of JSON Lines; UTF-16 and UTF-32 are decoded before splitting into lines."""
    wide = encoding.startswith(("utf-16", "utf-32"))
    reader = io.TextIOWrapper(stream, encoding=encoding, newline="\n") if wide else None
    lines: Iterable[bytes | str] = stream if reader is None else reader
    try:
        for number, line in enumerate(lines, 1):
            where = f"{file}, line {number}"
            if not line.strip():
                continue
            try:
                yield where, json.loads(line.decode(encoding) if isinstance(line, bytes) else line)
            except (ValueError, RecursionError):
                report.skip("a row that is no JSON", where)
    except UnicodeDecodeError as error:
        report.skip("the rest of a file after bytes that are not " + encoding, f"{file}: {error.reason}")
    finally:
        if reader is not None:
            reader.close()


def _list(stream: IO[bytes], file: Path, encoding: str, report: TextReport) -> list[tuple[str, Any]]:
    """Locations and rows of a JSON list, or of JSON Lines in a ``.json`` file, which is read as a whole."""
    try:
        text = stream.read().decode(encoding)
    except UnicodeDecodeError as error:
        report.skip("a file with bytes that are not " + encoding, f"{file}: {error.reason}")
        return []
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":
            return list(_lines(io.BytesIO(text.encode()), file, "utf-8", report))
        report.skip("a file that is no JSON", f"{file}: {error}")
        return []
    rows = rows if isinstance(rows, list) else [rows]
    return [(f"{file}, row {number}", row) for number, row in enumerate(rows, 1)]


def _document(text: Any, where: str, report: TextReport) -> Iterator[TextPiece]:
    """Pieces of a document that is completely in memory."""
    if not isinstance(text, str) or not text.strip():
        nothing = text is None or isinstance(text, str)
        report.skip("empty" if nothing else f"a {type(text).__name__} in place of a text", where)
        return
    report.documents += 1
    report.characters += len(text)
    text = text.encode("utf-8", "replace").decode()  # JSON can hold lone surrogates, which no tokenizer accepts.
    cuts = list(_cuts(text, report))
    for i, (a, b) in enumerate(zip([0, *cuts], [*cuts, len(text)], strict=True)):
        yield TextPiece(text[a:b], i == 0, i == len(cuts))


def _cuts(text: str, report: TextReport) -> Iterator[int]:
    start = 0
    while len(text) - start > PIECE:
        start = _cut(text, start, report)
        yield start


def _cut(text: str, start: int, report: TextReport) -> int:
    """Last position to cut a text at, at most one piece after ``start``."""
    window = text[start : start + PIECE + 1]
    place = 0
    for match in SAFE_CUT.finditer(window, len(window) // 2):
        place = match.end()
    if not place:
        report.cut += 1
        place = PIECE
    return start + place


def _text(stream: IO[bytes], file: Path, separator: str, encoding: str, report: TextReport) -> Iterator[TextPiece]:
    """Pieces of a text file, read in blocks; the first undecodable byte ends the file, which is counted."""
    waiting, first = "", True
    for block in _decoded(stream, file, encoding, report):
        waiting += block
        if separator:
            *whole, waiting = waiting.split(separator)
            for text in whole:
                yield from _close(text, first, report)
                first = True
        while len(waiting) > PIECE + len(separator):
            cut = _cut(waiting, 0, report)
            yield TextPiece(waiting[:cut], first, False)
            report.characters += cut
            first, waiting = False, waiting[cut:]
    yield from _close(waiting, first, report)


def _decoded(stream: IO[bytes], file: Path, encoding: str, report: TextReport) -> Iterator[str]:
    """Decoded blocks of a file up to its first undecodable byte."""
    # The decoder of utf-8-sig counts the positions of errors after the byte order mark.
    marked = codecs.lookup(encoding).name == "utf-8-sig"
    decoder = codecs.getincrementaldecoder("utf-8" if marked else encoding)()
    block = b"-"
    while block:
        block = stream.read(BLOCK)
        state = decoder.getstate()
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            report.skip("the rest of a file after bytes that are not " + encoding, f"{file}: {error.reason}")
            decoder.setstate(state)
            yield decoder.decode(block[: max(0, error.start - len(state[0]))]).removeprefix(MARK if marked else "")
            return
        yield text.removeprefix(MARK if marked else "")
        marked = marked and not text


def _close(text: str, first: bool, report: TextReport) -> Iterator[TextPiece]:
    """Remaining pieces of a document; none if the document is blank."""
    if first and not text.strip():
        return
    if first and len(text) > PIECE:
        yield from _document(text, "", report)
        return
    report.documents += 1
    report.characters += len(text)
    yield TextPiece(text, first, True)


def check_sources(paths: Sequence[str]) -> None:
    """Check that each path exists or may be the name of a dataset.

    Raises:
        DataError: If one does not; the message names it.
    """
    for path in paths:
        if not Path(path).exists() and (path.startswith((".", "/", "~")) or path.endswith((*SUFFIXES, ".json", TABLE))):
            raise DataError(f"there is no {path}", "give a text file, a JSONL file, a folder or a `datasets` name")
