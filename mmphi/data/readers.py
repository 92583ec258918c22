"""Registry of data readers, by the value of the setting ``data.sources.N.kind``.

A new reader is one function from a :class:`Source` to examples, one entry in :data:`READERS`, and a name in
:data:`mmphi.config.shared.SourceKind`. A program adds readers of its own with :func:`register`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from mmphi.config.shared import REGISTERED_KINDS, SourceKind, SourceSettings
from mmphi.data.captions import read_captions, read_karpathy
from mmphi.data.hf_datasets import read_dataset
from mmphi.data.llava import read_llava
from mmphi.data.schema import SPLITS, Example, ReadReport
from mmphi.errors import DataError, SettingsError

EVERY_KIND = ("kind", "name", "weight")  # Settings of a source that do not depend on its reader.


@dataclass(frozen=True)
class Source:
    """Input of a reader.

    Attributes:
        settings: Settings of the source.
        name: Name of the source; the prefix of image ids.
        report: Counts of kept and dropped rows, which the reader fills.
        scenes: Folder of the drawn scenes; ``None`` if no source uses them.
    """

    settings: SourceSettings
    name: str
    report: ReadReport
    scenes: Path | None = None

    @property
    def path(self) -> Path:
        """File of rows."""
        return Path(self.settings.path)

    @property
    def images(self) -> Path:
        """Folder that image paths are relative to."""
        return Path(self.settings.images)


@dataclass(frozen=True)
class Reader:
    """A reader of one source kind.

    Attributes:
        read: Function that yields the examples of a source. It counts every row in the source's report, as kept or
            dropped.
        help: Description in one line.
        file: Kind of file that ``path`` names, or where the rows come from without one.
        required: Settings of a source that must not be empty.
        optional: Further settings of a source that the reader uses.
        brings_splits: Whether the examples have the splits of the data; otherwise they are split by image.
        local: Whether the rows are in one file of this machine, named by ``path``, with images in a folder.
    """

    read: Callable[[Source], Iterator[Example]]
    help: str
    file: str
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    brings_splits: bool = False
    local: bool = False

    @property
    def settings(self) -> tuple[str, ...]:
        """Settings of a source that the reader uses, besides those of every kind."""
        return (*self.required, *self.optional)


def _scenes(source: Source) -> Iterator[Example]:
    if source.scenes is None:
        raise DataError("a source has kind scenes, but no scenes were drawn")
    for split in SPLITS:
        images = source.scenes / "images"
        yield from read_llava(source.scenes / f"{split}.json", images, source.name, source.report, split)


def _llava(source: Source) -> Iterator[Example]:
    yield from read_llava(source.path, source.images, source.name, source.report)


def _captions(source: Source) -> Iterator[Example]:
    yield from read_captions(
        source.path,
        source.images,
        source.name,
        source.report,
        image_column=source.settings.image_column,
        text_column=source.settings.text_column,
        question=source.settings.question,
    )


def _karpathy(source: Source) -> Iterator[Example]:
    question = source.settings.question
    yield from read_karpathy(source.path, source.images, source.name, source.report, question=question)


def _datasets(source: Source) -> Iterator[Example]:
    chosen = source.settings
    yield from read_dataset(
        chosen.path,
        chosen.split,
        source.name,
        source.report,
        image_column=chosen.image_column,
        text_column=chosen.text_column,
        question=chosen.question,
        revision=chosen.revision,
    )


FILE_AND_IMAGES = ("path", "images")
COLUMNS = ("image_column", "text_column", "question")
READERS: dict[str, Reader] = {
    "scenes": Reader(
        _scenes, "drawn images with captions and questions", "none, the stage `scenes` draws them", brings_splits=True
    ),
    "llava": Reader(
        _llava,
        "conversations in the formats of LLaVA-Instruct and OpenAI",
        "JSON or JSON Lines",
        required=FILE_AND_IMAGES,
        local=True,
    ),
    "captions": Reader(
        _captions,
        "one caption of an image per row",
        "CSV with a header",
        required=FILE_AND_IMAGES,
        optional=COLUMNS,
        local=True,
    ),
    "karpathy": Reader(
        _karpathy,
        "captions with the splits of Karpathy and Fei-Fei (2015)",
        "JSON",
        required=FILE_AND_IMAGES,
        optional=("question",),
        brings_splits=True,
        local=True,
    ),
    "datasets": Reader(
        _datasets,
        "one split of a dataset of the library `datasets`",
        "hub name, folder or Parquet file",
        required=("path",),
        optional=("split", *COLUMNS, "revision"),
    ),
}
"""Readers by the value of the setting ``data.sources.N.kind``."""


def register(kind: str, reader: Reader) -> None:
    """Add a reader, so that sources of :func:`mmphi.data.dataset_builder.read_examples` may have its kind.

    A registered kind is known in this process only. Stages refuse it, because a cache key does not contain the code of
    the reader. Registering a kind again replaces its reader.

    Args:
        kind: Value of the setting ``kind``.
        reader: Reader of such sources.

    Raises:
        SettingsError: If mmphi has a reader of this kind, or a source has no setting of a given name.
    """
    if kind in get_args(SourceKind):
        raise SettingsError(f"mmphi has a reader of kind {kind!r}", "give another name")
    known = [name for name in SourceSettings.model_fields if name not in EVERY_KIND]
    if unknown := [name for name in reader.settings if name not in known]:
        raise SettingsError(f"a source has no setting {unknown[0]!r}", f"a reader may use {', '.join(known)}")
    READERS[kind] = reader
    REGISTERED_KINDS.add(kind)


def read_source(
    settings: SourceSettings, name: str, report: ReadReport, scenes: Path | None = None
) -> Iterator[Example]:
    """Yields the examples of a source.

    Args:
        settings: Settings of the source.
        name: Name of the source.
        report: Counts kept and dropped rows.
        scenes: Folder of the drawn scenes; ``None`` if no source uses them.

    Raises:
        DataError: If a file cannot be read.
        SettingsError: If a setting that the reader requires is empty.
    """
    reader = READERS[settings.kind]
    for key in reader.required:
        if not getattr(settings, key):
            raise SettingsError(f"the source {name!r} of kind {settings.kind} has no {key}", f"set its {key}")
    yield from reader.read(Source(settings, name, report, scenes))


def unused_settings(settings: SourceSettings) -> Sequence[str]:
    """Returns the names of settings of a source that differ from their defaults and that its reader does not use."""
    used = READERS[settings.kind].settings
    fields = SourceSettings.model_fields
    changed = [name for name, field in fields.items() if getattr(settings, name) != field.default]
    return [name for name in changed if name not in (*EVERY_KIND, *used)]
