"""Reads datasets of the `datasets` library: any split, with a column of images and a column of texts."""

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
    """Load a split of a dataset.

    Args:
        name: Hub name (``owner/name``, or ``owner/name:configuration``), local folder, folder written by
            ``save_to_disk``, or a Parquet file.
        split: Name of the split; ignored for a Parquet file, or a folder that holds a single saved dataset.
        revision: Revision of a hub dataset; empty for the newest.

    Raises:
        DataError: If the dataset or split cannot be loaded.
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
            hub_is_reachable()  # Without offline mode, `datasets` would retry for most of a minute.
        owner, _, configuration = (name, "", "") if folder.exists() else name.partition(":")
        return datasets.load_dataset(owner, configuration or None, split=split, revision=revision or None)
    except Exception as error:  # Errors of `datasets`, pyarrow, fsspec and the HTTP client have no common base class.
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        hint = "if the hub is unreachable, give a local folder: one with a metadata.csv, or one that save_to_disk wrote"
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
    """Read a dataset from the hub or a local folder; a text column may hold one caption or a list of captions.

    Images in files of the dataset are used in place; embedded image bytes are written once, under their digest. The id
    of an image depends on its file or bytes and not on the row, so that an image in many rows counts once in the split.

    Args:
        name: Hub name (``owner/name``, or ``owner/name:configuration``), local folder, or folder written by
            ``save_to_disk``.
        split: Name of the split, for example ``train``.
        source: Name of the source.
        report: Counts kept and dropped rows.
        image_column: Column of images, or of paths inside a local folder.
        text_column: Column of captions.
        question: Question of every caption.
        cache: Folder for image bytes; by default in the user's cache folder.
        revision: Revision of a hub dataset; empty for the newest.

    Raises:
        DataError: If the dataset cannot be loaded, or lacks a column.
    """
    rows = _with_files(load_rows(name, split, revision), name, image_column, text_column)
    folder = cache or cache_folder() / "images"
    images = DatasetImages(ImageFolder(Path(name), source), folder, _fetched_to(name))
    written = ImageFileIndex(folder, _identity(rows, f"{name}/{split}/{image_column}"), len(rows))
    # If an earlier call wrote all images, their bytes are not read again.
    for number, row in enumerate(rows.select_columns([text_column]) if written.digests else rows):
        where = f"{name}, row {number + 1}"
        texts = row[text_column] if isinstance(row[text_column], list) else [row[text_column] or ""]
        if not texts or not all(isinstance(text, str) for text in texts):
            report.drop(source, where, "no caption" if not texts else "the caption is not text")
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
    """Identity of a dataset's rows; empty if it cannot be determined.

    The fingerprint of a generated dataset depends on the generating function only and not on the rows, so the identity
    includes size and modification time of the files that hold the rows.
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
    """Persistent map from the rows of a dataset to image files in the cache.

    Args:
        cache: Folder of image files.
        identity: Identity of the dataset's rows; if empty, the map is not stored.
        count: Number of rows.

    Attributes:
        digests: Digest of each row's image, empty if it is not in the cache; an empty list if no earlier call has read
            all rows.
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
        """Returns the image of a row if it is in the cache, else ``None``."""
        digest = self.digests[number] if self.digests else ""
        path = self.cache / digest
        return ImageRef(f"{source}/{digest}", path) if digest and path.is_file() else None

    def note(self, number: int, image: ImageRef) -> None:
        """Record the image of a row, if it is a file of the cache."""
        if image.path.parent == self.cache:
            self._found[number] = image.path.name

    def keep(self) -> None:
        """Store the map, after all rows were read."""
        if self._known and any(self._found) and not self.digests:
            with contextlib.suppress(OSError):  # The map only saves time.
                self._file.parent.mkdir(parents=True, exist_ok=True)
                part = self._file.with_suffix(f".{os.getpid()}")
                part.write_text(json.dumps(self._found))
                part.replace(self._file)


def _fetched_to(name: str) -> list[Path]:
    """Folders in which `datasets` and the hub's client store the files of a hub dataset."""
    import datasets
    from huggingface_hub import constants

    if Path(name).exists():
        return []
    repository = f"datasets--{name.partition(':')[0].replace('/', '--')}"
    return [Path(constants.HF_HUB_CACHE) / repository, Path(datasets.config.DOWNLOADED_DATASETS_PATH)]


def _with_files(rows: Any, name: str, image_column: str, text_column: str) -> Any:
    """The two columns, with images as stored bytes or paths."""
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
        raise DataError(
            f"column {image_column!r} of {name} contains {feature}, not images", "name another in image_column"
        )
    return rows


class DatasetImages:
    """The images of a dataset as files.

    Args:
        folder: Folder of a local dataset.
        cache: Folder for image bytes.
        fetched: Folders to which `datasets` downloads the files of the dataset. Rows that name any other file of this
            machine are rejected.
    """

    def __init__(self, folder: ImageFolder, cache: Path, fetched: Sequence[Path] = ()) -> None:
        self.folder, self.cache, self.fetched = folder, cache, [folder.resolve() for folder in fetched]

    def find(self, stored: dict[str, Any] | str | None) -> ImageRef:
        """Returns the file of an image.

        Args:
            stored: Bytes or path of the image as `datasets` stores them, or a path inside the dataset's folder.

        Raises:
            ImageError: If the image is missing, or is not a file of the dataset.
            DataError: If its bytes cannot be written.
        """
        if isinstance(stored, str):
            return self.folder.find(stored)
        content, path = (stored.get("bytes"), stored.get("path")) if stored else (None, None)
        if content is not None:
            return self._written(content)
        if not path or not Path(path).is_file():
            raise ImageError("missing image", f"{path or 'an image'} does not exist")
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
