"""Choice of the model that answers: a folder, a run, a registered model, or the newest model of the store."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from mmphi.errors import SettingsError, StoreError
from mmphi.tracking.status_reader import ModelRun, status_reader

TEXT_ONLY = "pretrain"
MOST_LOOKED_AT = 50  # Newest models of each stage that are considered.
LAST_PORT = 65535


def port_number(text: str) -> int:
    """Parse a TCP port.

    Raises:
        ArgumentTypeError: If it is not a number from 0 to :data:`LAST_PORT`.
    """
    if not text.isdigit() or int(text) > LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: a number from 0 to {LAST_PORT}")
    return int(text)


def model_options(made: argparse.ArgumentParser) -> None:
    """Add the options that choose the model, its Whisper and its context length."""
    made.add_argument("--model", "--run", default="", help="folder, run or registered model [the newest in the store]")
    made.add_argument("--preset", default="", help="without --model: the newest model of this preset [of any preset]")
    made.add_argument(
        "--whisper", default="", help="size or file of the Whisper for recordings [the model's, else tiny.en]"
    )
    made.add_argument("--context", type=int, default=0, help="longest conversation, in tokens [4096, or the model's]")


@dataclass(frozen=True)
class ModelChoice:
    """A model to load.

    Attributes:
        name: Folder, run ID or registered name, as :func:`mmphi.load` takes it.
        short: Name of the model in answers: the folder's name, or ``name``.
        label: Label for users: stage, preset and date of a run, or ``name``.
    """

    name: str
    short: str
    label: str


def _finished(preset: str, most: int) -> list[ModelRun]:
    """Finished runs with a model, newest first, without those that were built only for a study.

    Language models from scratch come after all others, because most are a part of a model that is built on them; models
    of smoke runs come last.
    """
    from mmphi.config.smoke import is_smoke, smoke_name
    from mmphi.stages import STAGES

    store = status_reader()
    found = [
        (not is_smoke(run.name), stage.name != TEXT_ONLY, run.ended_ms, run)
        for stage in STAGES.values()
        if stage.talks
        for name in ((preset, smoke_name(preset)) if preset else ("",))
        for run in store.models(stage.name, name, most)
    ]
    return [run for *_, run in sorted(found, key=lambda each: each[:3], reverse=True)]


def newest(preset: str = "") -> ModelChoice:
    """The newest model of the store, without trials of studies and models that were built only for them.

    Args:
        preset: Preset of the model; empty for any.

    Raises:
        StoreError: If there is none.
    """
    runs = _finished(preset, MOST_LOOKED_AT)
    if not runs and preset and (others := _finished("", MOST_LOOKED_AT)):
        names = ", ".join(dict.fromkeys(run.name for run in others[:5]))
        raise StoreError(f"there is no trained model of the preset {preset} in this store", f"it has: {names}")
    if not runs:
        raise StoreError("there is no trained model in this store", "run `mmphi projector`, or give --model FOLDER")
    return ModelChoice(runs[0].run_id, runs[0].run_id, _label(runs[0]))


def choices(most: int = 50) -> list[tuple[str, str]]:
    """Label and ID of each finished run with a model, newest first.

    Trials of studies and models that were built only for them are left out.

    Args:
        most: Largest number of runs of each stage.
    """
    return [(_label(run), run.run_id) for run in _finished("", most)]


def _label(run: ModelRun) -> str:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.ended_ms / 1000))
    return f"{run.name}, {when} (run {run.run_id[:8]})"


def chosen_model(options: argparse.Namespace) -> ModelChoice:
    """The model that the options of :func:`model_options` name, or the newest of the store.

    Raises:
        SettingsError: If both a model and a preset are named.
        StoreError: If none is named and the store has none.
    """
    if not options.model:
        return newest(options.preset)
    if options.preset:
        raise SettingsError("--model names the model, and --preset chooses among others", "leave one of them out")
    folder = Path(options.model).expanduser()
    if folder.is_dir():
        return ModelChoice(options.model, folder.resolve().name, options.model)
    return ModelChoice(options.model, options.model, options.model)
