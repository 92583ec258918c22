"""``mmphi benchmark ablation``: times a study of eight trials against eight cold runs and eight runs of a usual script.

All three train the same projectors: the same frozen models, images, texts, order, initial weights and steps.

- ``study``: `mmphi ablate` with one worker, which keeps models, features and tokenized texts loaded between trials;
- ``cold``: `mmphi projector --force`, one process per training;
- ``script``: transformers' LLaVA as documented (`llava_script.py` in this folder), one process per training.

Shared inputs (drawn images, stored features) are built beforehand; the time of the embedding is reported separately.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ablations.benchmarks.llava_pair import RATES, SEEDS, Shape, fixed_settings, make_models, write_work

STUDY = """from ablations.study import Study
STUDY = Study(question="Which rate?", factor="projector.learning_rate", levels={levels}, baseline="{baseline}",
              seeds={seeds}, fixed={fixed})
"""
SHAPES = {
    "small": Shape(),
    "tiny": Shape(64, 1, 64, 2, 64, 32, 3, 4, 40, 4),
}


def timed(command: Sequence[str], log: Path) -> float:
    """Run a command and return its duration in seconds.

    Args:
        command: Command line to run.
        log: File that its output is appended to.

    Raises:
        RuntimeError: If the command fails; the message ends with the tail of the log.
    """
    begun = time.perf_counter()
    with log.open("ab") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:5])} failed: {log.read_text()[-2000:]}")
    return time.perf_counter() - begun


def curves(metric: str = "train/loss") -> list[list[float]]:
    """Per-step losses and the final test loss of the newest finished run of each trial, by seed, then learning rate."""
    from mmphi.tracking.run_writer import TrackingStore

    store, found = TrackingStore(), []
    for seed in range(SEEDS):
        for rate in RATES:
            runs = (
                run
                for run in store.search("FINISHED", stage="projector")
                if run.data.params["projector.seed"] == str(seed)
                and float(run.data.params["projector.learning_rate"]) == float(rate)
            )
            run = next(runs)
            history = {m.step: m.value for m in store.client.get_metric_history(run.info.run_id, metric)}
            found.append([*(history[step] for step in sorted(history)), run.data.metrics["test/loss"]])
    return found


def measure(folder: Path, shape: Shape) -> dict[str, Any]:
    """Run the three sides; returns their seconds and losses, and the seconds of the embedding."""
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    os.environ.pop("MLFLOW_RUN_ID", None)
    log, fixed = folder / "log.txt", fixed_settings(folder, shape)
    preprocess = make_models(folder, shape)
    study = folder / "rates.py"
    levels = {rate: float(rate) for rate in RATES}
    study.write_text(STUDY.format(levels=levels, baseline=RATES[0], seeds=SEEDS, fixed=fixed))
    mmphi = [sys.executable, "-m", "mmphi"]
    options = [word for name, value in fixed.items() for word in (f"--{name}", json.dumps(value).strip('"'))]
    embedding = timed([*mmphi, "embed", *options], log)
    work = write_work(folder, fixed, preprocess, shape)
    seconds = {"study": [timed([*mmphi, "ablate", str(study), "--workers", "1"], log)], "cold": [], "script": []}
    losses = {"study": curves()}
    script = str(Path(__file__).with_name("llava_script.py"))
    for number, path in enumerate(work):
        seed, rate = divmod(number, len(RATES))
        trial = ["--projector.seed", str(seed), "--projector.learning_rate", RATES[rate], "--force"]
        seconds["cold"].append(timed([*mmphi, "projector", *options, *trial], log))
        seconds["script"].append(timed([sys.executable, script, str(path)], log))
    losses["cold"] = curves()
    outputs = [json.loads(path.with_suffix(".out.json").read_text()) for path in work]
    losses["script"] = [[*out["losses"], out["test"]] for out in outputs]
    return {"seconds": {side: sum(of) for side, of in seconds.items()}, "losses": losses, "embedding": embedding}


def furthest(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """Largest absolute difference between losses of the same step of the same trial."""
    pairs = zip(one, other, strict=True)
    return max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


def main(arguments: list[str]) -> int:
    """``mmphi benchmark ablation``."""
    parser = argparse.ArgumentParser(prog="mmphi benchmark ablation", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small", help="sizes of all [small]")
    parser.add_argument("--steps", type=int, help="optimiser steps of a training")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    shape = SHAPES[options.shape]
    shape = replace(shape, steps=options.steps) if options.steps else shape
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), shape)
    report(found, shape)
    if options.json:
        options.json.write_text(json.dumps({"shape": asdict(shape), **found}, indent=1))
    return 0


def report(found: Mapping[str, Any], shape: Shape) -> None:
    """Print the seconds of the three sides, their ratios, and the largest differences of their losses."""
    seconds, losses = found["seconds"], found["losses"]
    trials = len(RATES) * SEEDS
    print(f"{trials} trainings of {shape.steps} steps of {shape.batch_size} images, and the test loss of each")
    print(f"{'side':<8}{'seconds':>10}{'over study':>12}{'largest difference of a loss':>32}")
    for side in ("study", "cold", "script"):
        apart = furthest(losses["study"], losses[side])
        print(f"{side:<8}{seconds[side]:>10.1f}{seconds[side] / seconds['study']:>12.2f}{apart:>32.2g}")
    print(f"embedding all images once, which the script does again every step: {found['embedding']:.1f} s")
    for number in range(trials):
        ends = ", ".join(f"{side} {losses[side][number][-1]:.5f}" for side in ("study", "cold", "script"))
        print(f"trial {number}: test loss {ends}")
