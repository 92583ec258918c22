"""Records of a dataset: conversations about images and recordings, and the report of how they were read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")  # From the least to the most strict.


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image file, and an id that does not depend on where the file is stored.

    Attributes:
        id: ``source name/path relative to the source's image folder``; splits depend on it.
        path: Path of the file on this machine; its features are keyed by its content.
        view: Number of an augmented view: 0 is the image itself, others are crops.
        content: Content of an image in memory, from a file or a request. Then ``id`` is its SHA-256, and ``path`` is
            not read, and empty if there was no file.
    """

    id: str
    path: Path
    view: int = 0
    content: bytes | None = field(default=None, compare=False, repr=False)

    @property
    def source(self) -> Path | bytes:
        """Content of the image if it is in memory, else the path."""
        return self.path if self.content is None else self.content

    @property
    def name(self) -> str:
        """Name of the image in messages."""
        return str(self.path) if self.path.name else "the image"


@dataclass(frozen=True, slots=True)
class AudioRef:
    """A recording, and an id that does not depend on where it is stored.

    Attributes:
        id: Unique id; splits depend on it.
        source: Path of a file, or its content.
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
        id: Unique within its source; a string even if the file holds an integer.
        images: Images in order, at the marks ``<image>`` of the questions if there are as many marks as images, else
            before the first turn.
        turns: At least one.
        source: Name of its source.
        split: The split of its *images*.
        attributes: Properties for scores and mixtures, such as ``kind``, or the drawn objects of a scene.
        context: Text at the position of images, for a conversation without images.
        audio: Recordings in order, at the marks ``<audio>`` of the questions if there are as many marks as recordings,
            else before the first question, or in place of an empty one.
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
        """The first image, or ``None``."""
        return self.images[0] if self.images else None

    @property
    def questions(self) -> list[tuple[str, str | None]]:
        """Pairs of question and answer, in the form that prompts take."""
        return [(turn.question, turn.answer) for turn in self.turns]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A dropped row, with the reason."""

    source: str
    where: str
    reason: str


@dataclass
class ReadReport:
    """Counts of kept and dropped rows by source, with the reasons."""

    kept: Counter[str] = field(default_factory=Counter)
    dropped: list[Dropped] = field(default_factory=list)
    notes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def note(self, source: str, text: str) -> None:
        """Count a remark about kept rows."""
        self.notes[source, text] += 1

    def keep(self, source: str, count: int = 1) -> None:
        """Count kept rows."""
        self.kept[source] += count

    def drop(self, source: str, where: str, reason: str) -> None:
        """Record a dropped row; ``where`` is its line or id."""
        self.dropped.append(Dropped(source, where, reason))

    def drop_kept(self, source: str, where: str, reason: str) -> None:
        """Record a row as dropped that was first counted as kept."""
        self.kept[source] -= 1
        self.drop(source, where, reason)

    @property
    def bad_share(self) -> float:
        """Share of dropped rows among all rows; 0 if nothing was read."""
        total = self.kept.total() + len(self.dropped)
        return len(self.dropped) / total if total else 0.0

    def rows(self) -> Iterator[dict[str, str | int]]:
        """Yields one row per source and outcome, with the place of an example, as a table for the tracking store."""
        for source, count in sorted(self.kept.items()):
            yield {"source": source, "outcome": "kept", "rows": count, "for example": ""}
        for (source, text), count in sorted(self.notes.items()):
            yield {"source": source, "outcome": f"kept: {text}", "rows": count, "for example": ""}
        reasons = Counter((d.source, d.reason) for d in self.dropped)
        for (source, reason), count in sorted(reasons.items()):
            where = next(d.where for d in self.dropped if (d.source, d.reason) == (source, reason))
            yield {"source": source, "outcome": f"dropped: {reason}", "rows": count, "for example": where}

    def table(self) -> str:
        """Returns the rows as aligned text."""
        lines = [(str(r["source"]), str(r["outcome"]), str(r["rows"]), str(r["for example"])) for r in self.rows()]
        widths = [max((len(line[i]) for line in lines), default=0) for i in range(3)]
        return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in lines)
