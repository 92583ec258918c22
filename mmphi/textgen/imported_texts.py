"""Imported texts as documents, for the same filters as generated ones."""

from __future__ import annotations

from collections.abc import Iterator

from mmphi.config.corpus import TextSourceSettings
from mmphi.data.text_sources import TextReport, read_texts
from mmphi.textgen.shards import Document


def documents_of(source: TextSourceSettings, report: TextReport) -> Iterator[Document]:
    """Yields the documents of a text source, in order.

    Args:
        source: Settings of the source.
        report: Counts of what was read, updated in place.
    """
    pieces = read_texts(
        source.path,
        report,
        kind=source.kind,
        column=source.column,
        separator=source.separator,
        encoding=source.encoding,
        split=source.split,
        revision=source.revision,
    )
    open_: list[str] = []
    number = 0
    for piece in pieces:
        open_.append(piece.text)
        if piece.last:
            text = "".join(open_).strip()
            yield Document(f"{source.title}/{number}", text, "", 0, source.title, "", None, 0, True)
            open_, number = [], number + 1
