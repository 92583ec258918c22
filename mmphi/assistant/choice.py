"""Which model is talked to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmphi.errors import StoreError

TALKING = ("merge", "qlora", "speech", "projector", "pretrain")  # Stages that end in a model that talks.


def newest() -> str:
    """The newest run in the store that ended in a model.

    Raises:
        StoreError: If there is none.
    """
    from mmphi.tracking.store import Store

    store = Store()
    runs: list[Any] = [run for stage in TALKING if (run := store.newest(stage)) is not None]
    if not runs:
        raise StoreError("there is no trained model in this store", "run `mmphi projector`, or give --model FOLDER")
    return str(max(runs, key=lambda run: run.info.end_time or 0).info.run_id)


def named(model: str) -> tuple[str, str]:
    """A model to load and what to call it, where a folder, run, registered name or nothing was given."""
    chosen = model or newest()
    return chosen, Path(chosen).name if Path(chosen).expanduser().is_dir() else chosen
