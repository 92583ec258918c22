"""A study whose trials take no time, and a worker for it; as a script, drives the study or is a worker."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ablations.driver import Driver
from ablations.paths import logs_folder, trial_storages
from ablations.study import Study
from ablations.study_run import StudyRun
from mmphi.config.projector import ProjectorSettings
from mmphi.errors import TrainingError
from mmphi.pipeline.stage import Context, Stage
from mmphi.tracking.run_writer import TrackingStore

COMMAND = (sys.executable, __file__, "worker")
STEPS, STEP_S = 8, 0.03
STUDY = Study(
    question="Which toy is best?",
    factor="projector.layers",
    levels={"one": 1, "two": 2, "three": 3},
    baseline="two",
    nuisance={"projector.learning_rate": [1e-3, 1e-2]},
    tuning_seeds=(1000,),
    tuning_extensions=0,
    seeds=3,
    fixed={"projector.steps": STEPS},
    costs={"projector/parameters": "parameters"},
    margin=0.01,
)


def loss(layers: int, rate: float, seed: int) -> float:
    """What a toy reaches: deeper is better by 0.1, the best rate differs by level, seeds differ by up to 0.05."""
    best = 1e-2 if layers == 1 else 1e-3
    return 2.0 - 0.1 * layers + (0.0 if rate == best else 0.3) + 0.05 * random.Random(seed).random()


def toy(ctx: Context) -> Mapping[str, float]:
    """Write a file a step, going on from those there are; do what the environment asks for on the way."""
    chosen = ctx.settings(ProjectorSettings)
    begun = len(list(ctx.folder.glob("step-*")))
    for step in range(begun, chosen.steps):
        time.sleep(STEP_S * (20 if os.environ.get("TOY_SLOW") else 1))
        (ctx.folder / f"step-{step}").write_text(str(step))
        ctx.tracker.metrics({"val/loss": 3.0 / (step + 1)}, step)
        die = Path(os.environ.get("TOY_DIE", "/nowhere"))
        if step == 2 and die.exists() and (die.read_text() == "always" or die.unlink() is None):
            os.kill(os.getpid(), signal.SIGKILL)
    if chosen.dropout == 0.5:
        raise TrainingError("the loss at step 3 is nan")
    if chosen.dropout == 0.75:
        raise ZeroDivisionError("an odd toy")
    if chosen.dropout == 0.25:
        raise MemoryError("out of memory")
    reached = loss(chosen.layers, chosen.learning_rate, chosen.seed)
    if chosen.dropout in (0.125, 0.375):  # The training ends, and its evaluation gives no number.
        reached = float("nan") if chosen.dropout == 0.125 else float("inf")
    final = {"val/loss": reached, "test/loss": reached + 0.01, "projector/parameters": 1000.0 * chosen.layers}
    ctx.tracker.metrics(final, chosen.steps)
    return final


TOYS = {"projector": Stage("projector", 1, "a toy", ("projector",), toy)}


def driver(study: Study = STUDY, name: str = "toy", storage: str = "", **changes: Any) -> Driver:
    """A driver of the toy study in the environment's store."""
    store = TrackingStore()
    record = StudyRun.open(store, name, study.declaration())
    return Driver(study, record, trial_storages(store, name, study, storage), **changes)


def drive(made: Driver, workers: int = 1) -> None:
    """Run a driver's study with toy workers."""
    made.run(workers, logs_folder(TrackingStore(), made.record.name), command=COMMAND)


def results(made: Driver) -> dict[str, float | None]:
    """How cells ended."""
    return {o.cell.name: o.value for storage in made.storages.values() for o in storage.outcomes()}


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    if sys.argv[1] == "worker":
        import mmphi.stages
        from ablations import worker

        mmphi.stages.STAGES.clear()
        mmphi.stages.STAGES.update(TOYS)
        worker.main(int(sys.argv[2]))
    else:
        # A shell in the background, as continuous integration may be, starts its commands deaf to Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        seeds, workers, storage = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else ""
        made = driver(replace(STUDY, seeds=seeds), storage=storage, retries=1000)
        print("driving", flush=True)
        drive(made, workers)
        print(json.dumps(results(made)))
