"""What a dataset is made of: conversations about images, and the account of how they were read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image file and the name it keeps wherever the file is stored.

    Attributes:
        id: ``source name/path relative to the source's image folder``; splits go by it.
        path: Where the file lies on this machine; its features are found by its content.
        view: Which view of it: 0 is the image itself, others are parts of it.
        content: What the file held when it was shown, or what was sent; ``id`` is its SHA-256 then, and ``path`` is not
            read, and empty where there was no file.
    """

    id: str
    path: Path
    view: int = 0
    content: bytes | None = field(default=None, compare=False, repr=False)

    @property
    def source(self) -> Path | bytes:
        """The file, or what it holds."""
        return self.path if self.content is None else self.content

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return str(self.path) if self.path.name else "the image"


@dataclass(frozen=True, slots=True)
class AudioRef:
    """A recording, and the name it keeps wherever it is stored.

    Attributes:
        id: Tells it from others; splits go by it.
        source: Its file, or what one holds.
    """

    id: str
    source: Path | bytes


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer; the question of a plain caption is empty."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation, about any number of images.

    Attributes:
        id: Unique within its source; a string even where the file holds an integer.
        images: In order; they stand where questions say ``<image>`` as often as there are images, else before the first
            turn.
        turns: At least one.
        source: Name of the source it was read from.
        split: The split its *images* belong to.
        attributes: What an answer can be scored on (scenes: ``kind`` and the drawn objects), else empty.
        context: Text that stands where images would: what a conversation without any is about.
        audio: Recordings, in order; they stand where questions say ``<audio>`` as often as there are recordings, else
            before the first question, or in its place where that is empty.
    """

    id: str
    images: tuple[ImageRef, ...]
    turns: tuple[Turn, ...]
    source: str
    split: Split = "train"
    attributes: dict[str, str] = field(default_factory=dict, compare=False)
    context: str = ""
    audio: tuple[AudioRef, ...] = ()

    @property
    def image(self) -> ImageRef | None:
        """The first image, if there is one."""
        return self.images[0] if self.images else None

    @property
    def questions(self) -> list[tuple[str, str | None]]:
        """Questions and answers, as a prompt takes them."""
        return [(turn.question, turn.answer) for turn in self.turns]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that was not kept, and why."""

    source: str
    where: str
    reason: str


@dataclass
class ReadReport:
    """What was read: rows kept, dropped, and the reasons, by source."""

    kept: Counter[str] = field(default_factory=Counter)
    dropped: list[Dropped] = field(default_factory=list)
    notes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def note(self, source: str, text: str) -> None:
        """Count something worth knowing about rows that were kept."""
        self.notes[source, text] += 1

    def keep(self, source: str, count: int = 1) -> None:
        """Count rows that were kept."""
        self.kept[source] += count

    def drop(self, source: str, where: str, reason: str) -> None:
        """Record a row that was left out; ``where`` names its line or id."""
        self.dropped.append(Dropped(source, where, reason))

    def drop_kept(self, source: str, where: str, reason: str) -> None:
        """Record a row that was kept at first and fell out later."""
        self.kept[source] -= 1
        self.drop(source, where, reason)

    @property
    def bad_share(self) -> float:
        """Dropped rows over all rows, 0 where nothing was read."""
        total = self.kept.total() + len(self.dropped)
        return len(self.dropped) / total if total else 0.0

    def rows(self) -> Iterator[dict[str, str | int]]:
        """One row per source and outcome, with an example of where: a table for the tracking store."""
        for source, count in sorted(self.kept.items()):
            yield {"source": source, "outcome": "kept", "rows": count, "for example": ""}
        for (source, text), count in sorted(self.notes.items()):
            yield {"source": source, "outcome": f"kept: {text}", "rows": count, "for example": ""}
        reasons = Counter((d.source, d.reason) for d in self.dropped)
        for (source, reason), count in sorted(reasons.items()):
            where = next(d.where for d in self.dropped if (d.source, d.reason) == (source, reason))
            yield {"source": source, "outcome": f"dropped: {reason}", "rows": count, "for example": where}

    def table(self) -> str:
        """The rows as aligned text."""
        lines = [(str(r["source"]), str(r["outcome"]), str(r["rows"]), str(r["for example"])) for r in self.rows()]
        widths = [max((len(line[i]) for line in lines), default=0) for i in range(3)]
        return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in lines)
