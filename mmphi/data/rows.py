"""Rows of a dataset of the `datasets` library: a hub name, a folder, or what it saved itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmphi.data.reach import hub_in_reach
from mmphi.errors import DataError


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
            hub_in_reach()  # Where it is not, `datasets` would try for most of a minute.
        owner, _, configuration = (name, "", "") if folder.exists() else name.partition(":")
        return datasets.load_dataset(owner, configuration or None, split=split, revision=revision or None)
    except Exception as error:  # Of `datasets`, pyarrow, fsspec or the HTTP client: they share no ancestor.
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        hint = "with no hub in reach, give a local folder: one with a metadata.csv, or one that save_to_disk wrote"
        raise DataError(
            f"the dataset {name!r}, split {split!r}, cannot be loaded: {reason[0]}",
            "mend the folder, or name another split" if folder.exists() else hint,
        ) from error
