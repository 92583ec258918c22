"""Which model is talked to."""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

from mmphi.errors import StoreError


def model_options(made: argparse.ArgumentParser) -> None:
    """Add what says which model it is, and who hears for it."""
    made.add_argument("--model", "--run", default="", help="folder, run or registered model [the newest in the store]")
    made.add_argument(
        "--whisper", default="", help="size or file of the Whisper that hears [the model's, else tiny.en]"
    )
    made.add_argument("--context", type=int, default=0, help="longest conversation, in tokens [4096, or the model's]")


def _talking() -> list[str]:
    from mmphi.stages import STAGES

    return [stage.name for stage in STAGES.values() if stage.talks]


def newest() -> str:
    """The newest run in the store that ended in a model.

    Raises:
        StoreError: If there is none.
    """
    from mmphi.tracking.store import Store

    store = Store()
    runs: list[Any] = [run for stage in _talking() if (run := store.newest(stage)) is not None]
    if not runs:
        raise StoreError("there is no trained model in this store", "run `mmphi projector`, or give --model FOLDER")
    return str(max(runs, key=lambda run: run.info.end_time or 0).info.run_id)


def choices(most: int = 50) -> list[tuple[str, str]]:
    """Finished runs of the store that ended in a model, newest first: what each is called, and its id.

    Args:
        most: No more of them than this of each stage.
    """
    from mmphi.tracking.store import Store

    store = Store()
    found: list[Any] = []
    for stage in _talking():
        runs = (run for run in store.search("FINISHED", stage=stage) if "mmphi.key" in run.data.tags)
        found += itertools.islice(runs, most)
    found.sort(key=lambda run: run.info.end_time or 0, reverse=True)
    return [(f"{run.info.run_name}, {_when(run.info.end_time)}", str(run.info.run_id)) for run in found]


def _when(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(milliseconds / 1000))


def named(model: str) -> tuple[str, str]:
    """A model to load and what to call it, where a folder, run, registered name or nothing was given."""
    chosen = model or newest()
    return chosen, Path(chosen).name if Path(chosen).expanduser().is_dir() else chosen
