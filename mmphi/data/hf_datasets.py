"""Datasets of the `datasets` library: any of its splits, and the images and texts of two of its columns."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmphi.data.content_hash import cache_folder
from mmphi.data.hf_connectivity import hub_is_reachable
from mmphi.data.images import ImageFolder
from mmphi.data.schema import Example, ImageRef, ReadReport, Turn
from mmphi.errors import DataError, ImageError


def load_rows(name: str, split: str, revision: str) -> Any:
    """Load a split.

    Args:
        name: Hub name (``owner/name``, or ``owner/name:configuration``), local folder, folder written by
            ``save_to_disk``, or a Parquet file.
        split: Its split.
        revision: Of a hub dataset; empty takes the newest.

    Raises:
        DataError: If it cannot be had.
    """
    import datasets

    folder = Path(name)
    try:
        if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
            loaded: Any = datasets.load_from_disk(name)
            if not isinstance(loaded, datasets.DatasetDict):
                return loaded
            if split in loaded:
                return loaded[split]
            raise ValueError(f"it has the splits {', '.join(loaded)}")
        if folder.is_file():
            return datasets.load_dataset("parquet", data_files=str(folder), split="train")
        if not folder.exists():
            hub_is_reachable()  # Where it is not, `datasets` would try for most of a minute.
        owner, _, configuration = (name, "", "") if folder.exists() else name.partition(":")
        return datasets.load_dataset(owner, configuration or None, split=split, revision=revision or None)
    except Exception as error:  # Of `datasets`, pyarrow, fsspec or the HTTP client: they share no ancestor.
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        hint = "with no hub in reach, give a local folder: one with a metadata.csv, or one that save_to_disk wrote"
        raise DataError(
            f"the dataset {name!r}, split {split!r}, cannot be loaded: {reason[0]}",
            "fix the folder, or name another split" if folder.exists() else hint,
        ) from error


def read_dataset(
    name: str,
    split: str,
    source: str,
    report: ReadReport,
    *,
    image_column: str = "image",
    text_column: str = "caption",
    question: str = "",
    cache: Path | None = None,
    revision: str = "",
) -> Iterator[Example]:
    """Read a dataset by hub name or local folder; a text column may hold one caption or a list of them.

    Images that lie in the dataset's own files are used where they are; bytes are written once, under their digest. An
    image's id follows its file or its bytes, not its row: one that stands in many rows is one image to the split.

    Args:
        name: Hub name (``owner/name``, or ``owner/name:configuration``), local folder, or folder written by
            ``save_to_disk``.
        split: Its split, ``train`` for example.
        source: Name of the source.
        report: Counts what was kept and dropped.
        image_column: Column of images, or of paths inside a local folder.
        text_column: Column of captions.
        question: Put before every caption.
        cache: Where image bytes are written; the user's cache folder where left out.
        revision: Of a hub dataset; empty takes the newest.

    Raises:
        DataError: If the dataset cannot be had, or lacks a column.
    """
    rows = _with_files(load_rows(name, split, revision), name, image_column, text_column)
    folder = cache or cache_folder() / "images"
    images = DatasetImages(ImageFolder(Path(name), source), folder, _fetched_to(name))
    written = ImageFileIndex(folder, _identity(rows, f"{name}/{split}/{image_column}"), len(rows))
    # Where all images were written by an earlier reading, none of their bytes is read again.
    for number, row in enumerate(rows.select_columns([text_column]) if written.digests else rows):
        where = f"{name}, row {number + 1}"
        texts = row[text_column] if isinstance(row[text_column], list) else [row[text_column] or ""]
        if not texts or not all(isinstance(text, str) for text in texts):
            report.drop(source, where, "no caption" if not texts else "the caption is no text")
            continue
        try:
            ref = written.find(number, source) or images.find(
                rows[number][image_column] if written.digests else row[image_column]
            )
        except ImageError as error:
            report.drop(source, where, error.reason)
            continue
        written.note(number, ref)
        for i, text in enumerate(texts):
            report.keep(source)
            yield Example(f"{number}.{i}", (ref,), (Turn(question, text.strip()),), source)
    written.keep()


def _identity(rows: Any, name: str) -> str:
    """What tells the rows of a dataset from others; empty where nothing does.

    The fingerprint of a dataset that a function generates is the function's, whatever it yields: the files that the
    rows are in have to be the same, too.
    """
    fingerprint, files = (
        getattr(rows, "_fingerprint", ""),
        [each["filename"] for each in getattr(rows, "cache_files", ())],
    )
    if not fingerprint or not files:
        return ""
    looks = [f"{file}:{Path(file).stat().st_size}:{Path(file).stat().st_mtime_ns}" for file in files]
    return "/".join([name, fingerprint, *looks])


class ImageFileIndex:
    """Which image of a dataset is which file of the cache, remembered from one reading to the next.

    Args:
        cache: Where the bytes of images are written.
        identity: Of the dataset's rows; nothing is remembered of rows without one.
        count: Rows.

    Attributes:
        digests: Of each row's image, empty where it is not in the cache; no list before the first reading has ended.
    """

    def __init__(self, cache: Path, identity: str, count: int) -> None:
        self.cache, self._file = cache, cache.with_name("dataset_rows") / f"{_digest(identity.encode())}.json"
        self._found, self.digests, self._known = [""] * count, list[str](), bool(identity)
        if not identity:
            return
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(self._file.read_text())
            if isinstance(known, list) and len(known) == count:
                self.digests = known

    def find(self, number: int, source: str) -> ImageRef | None:
        """The image of a row, where it is in the cache."""
        digest = self.digests[number] if self.digests else ""
        path = self.cache / digest
        return ImageRef(f"{source}/{digest}", path) if digest and path.is_file() else None

    def note(self, number: int, image: ImageRef) -> None:
        """Remember a row's image, if it is a file of the cache."""
        if image.path.parent == self.cache:
            self._found[number] = image.path.name

    def keep(self) -> None:
        """Write what was found, after all rows were read."""
        if self._known and any(self._found) and not self.digests:
            with contextlib.suppress(OSError):  # It saves time and nothing else.
                self._file.parent.mkdir(parents=True, exist_ok=True)
                part = self._file.with_suffix(f".{os.getpid()}")
                part.write_text(json.dumps(self._found))
                part.replace(self._file)


def _fetched_to(name: str) -> list[Path]:
    """Where `datasets` and the hub's client keep the files of a hub dataset."""
    import datasets
    from huggingface_hub import constants

    if Path(name).exists():
        return []
    repository = f"datasets--{name.partition(':')[0].replace('/', '--')}"
    return [Path(constants.HF_HUB_CACHE) / repository, Path(datasets.config.DOWNLOADED_DATASETS_PATH)]


def _with_files(rows: Any, name: str, image_column: str, text_column: str) -> Any:
    """The two columns, images as the bytes or paths they are stored as."""
    import datasets

    for column in (image_column, text_column):
        if column not in rows.column_names:
            raise DataError(
                f"{name} has no column {column!r}; it has {', '.join(rows.column_names)}",
                "name its columns in image_column and text_column of the source",
            )
    rows = rows.select_columns([image_column, text_column])
    feature = rows.features[image_column]
    if isinstance(feature, datasets.Image):
        return rows.cast_column(image_column, datasets.Image(decode=False))
    if getattr(feature, "dtype", "") not in ("string", "large_string"):
        raise DataError(f"column {image_column!r} of {name} holds {feature}, no images", "name another in image_column")
    return rows


class DatasetImages:
    """The images of a dataset as files.

    Args:
        folder: The dataset's own folder, where it is a local one.
        cache: Where bytes are written.
        fetched: Folders that `datasets` fetches the dataset's own files to. A row may name no other file: it could be
            any of this machine.
    """

    def __init__(self, folder: ImageFolder, cache: Path, fetched: Sequence[Path] = ()) -> None:
        self.folder, self.cache, self.fetched = folder, cache, [folder.resolve() for folder in fetched]

    def find(self, stored: dict[str, Any] | str | None) -> ImageRef:
        """The file of an image.

        Args:
            stored: Its bytes or path as `datasets` keeps them, or a path inside the dataset's folder.

        Raises:
            ImageError: If there is none.
            DataError: If its bytes cannot be written.
        """
        if isinstance(stored, str):
            return self.folder.find(stored)
        content, path = (stored.get("bytes"), stored.get("path")) if stored else (None, None)
        if content is not None:
            return self._written(content)
        if not path or not Path(path).is_file():
            raise ImageError("missing image", f"{path or 'an image'} is not there")
        place = Path(path).resolve()
        if place.is_relative_to(self.folder.folder):
            return self.folder.find(path)
        if not any(place.is_relative_to(folder) for folder in self.fetched):
            raise ImageError("path leaves the dataset's folder", f"{path} is no file of the dataset")
        return ImageRef(f"{self.folder.source}/{_digest(Path(path).read_bytes())}", Path(path))

    def _written(self, content: bytes) -> ImageRef:
        digest = _digest(content)
        path, part = self.cache / digest, self.cache / f"{digest}.{os.getpid()}"
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                part.write_bytes(content)
                part.rename(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise DataError(
                f"{path} cannot be written: {error.strerror}", "make room, or set XDG_CACHE_HOME to another folder"
            ) from error
        return ImageRef(f"{self.folder.source}/{digest}", path)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
