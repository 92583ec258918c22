"""The stages at sizes that take seconds; as a script, builds one in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from mmphi.pipeline.build import Pipeline
from mmphi.stages import STAGES, Settings, load_settings
from mmphi.training.hf_trainer import ExactLossTrainer

SMALL = {
    "scenes.train_images": "40",
    "scenes.validation_images": "6",
    "scenes.test_images": "8",
    "scenes.texts": "450",
    "pretrain.steps": "6",
    "pretrain.layers": "2",
    "pretrain.width": "32",
    "pretrain.heads": "4",
    "pretrain.partial_rotary_factor": "0",
    "pretrain.initializer_range": "0.02",
    "pretrain.batch_size": "16",
    "light_clip.steps": "4",
    "light_clip.batch_size": "16",
    "light_clip.width": "32",
    "light_clip.workers": "0",
    "embed.workers": "0",
    "projector.alignment_steps": "0",
    "projector.steps": "8",
    "projector.width": "32",
    "projector.batch_size": "8",
    "projector.eval_every": "4",
    "projector.save_every": "2",
    "projector.log_every": "1",
    "projector.sample_tokens": "4",
    "projector.sample_images": "2",
    "qlora.steps": "6",
    "qlora.batch_size": "8",
    "qlora.rank": "4",
    "qlora.eval_every": "3",
    "qlora.save_every": "2",
    "qlora.log_every": "1",
    "qlora.sample_tokens": "4",
    "qlora.sample_images": "2",
    "evaluate.yes_no": "4",
    "evaluate.max_new_tokens": "6",
}


def settings(**changes: str) -> Settings:
    """Small settings, with others changed; a dot is written as two underscores."""
    return load_settings("tiny", {**SMALL, **{name.replace("__", "."): value for name, value in changes.items()}})


@contextmanager
def built(stage: str, start: Path, folder: Path, **changes: str) -> Iterator[Pipeline]:
    """A store of its own in which a stage is built.

    Args:
        stage: What to build.
        start: A store's folder, which is copied first: the session's ``small_chain``, or an empty one.
        folder: Of the copy; the cache is beside it.
        **changes: Of the settings.
    """
    copy_store(start, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        pipeline = Pipeline(STAGES)
        pipeline.build(stage, settings(**changes))
        torch.set_num_threads(threads)
        yield pipeline


def copy_store(start: Path, folder: Path) -> None:
    """Copy a tracking store with its artifacts and cache; paths in its database become those of the copy.

    Files that are one file by hard links are one file in the copy.
    """
    copied: dict[int, str] = {}

    def copy(source: str, target: str) -> None:
        first = copied.setdefault(Path(source).stat().st_ino, target)
        if first == target:
            shutil.copy2(source, target)
        else:
            os.link(first, target)

    shutil.copytree(start, folder, dirs_exist_ok=True, copy_function=copy)
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        names = "SELECT name FROM sqlite_master WHERE type = 'table'"
        for (table,) in database.execute(names).fetchall():
            for _, column, kind, *_ in database.execute(f"PRAGMA table_info({table})").fetchall():
                if kind.startswith(("VARCHAR", "TEXT")):
                    change = f"UPDATE {table} SET {column} = replace({column}, ?, ?) WHERE {column} LIKE ?"
                    database.execute(change, (str(start), str(folder), f"%{start}%"))
        database.commit()


@contextmanager
def interrupted_after(step: int) -> Iterator[None]:
    """Trainings stop by ``KeyboardInterrupt`` as soon as the checkpoint of a step is complete."""
    save = ExactLossTrainer._save_checkpoint

    def interrupting(self: ExactLossTrainer, model: torch.nn.Module, trial: object) -> None:
        save(self, model, trial)
        if self.state.global_step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExactLossTrainer, "_save_checkpoint", interrupting)
        with pytest.raises(KeyboardInterrupt):
            yield


def main() -> None:
    """Build a stage; with SMALL_DIE_AT the process kills itself after so many optimiser steps."""
    torch.set_num_threads(1)
    left = int(os.environ.get("SMALL_DIE_AT", "-1"))
    if left >= 0:
        save = ExactLossTrainer._save_checkpoint

        def dying(self: ExactLossTrainer, model: torch.nn.Module, trial: object) -> None:
            save(self, model, trial)
            if self.state.global_step >= left:
                os.kill(os.getpid(), signal.SIGKILL)

        ExactLossTrainer._save_checkpoint = dying
    changes = dict(word.split("=", 1) for word in sys.argv[2:])
    result = Pipeline(STAGES).build(sys.argv[1], settings(**changes))
    print(json.dumps({"run_id": result.run_id, "path": str(result.path), "metrics": dict(result.metrics)}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
