"""Adapter steps side by side: the same models, adapter, images and conversations, the usual way and here.

- ``peft``: PEFT on transformers' LLaVA in NF4 under transformers' Trainer, rows padded to the longest, the image tower
  in the loop, logits at every position;
- ``mmphi``: NF4, the same adapter, stored features, packed rows, logits only where a token is learned.

Each side runs in a process of its own, so that its peak memory is its own. Losses are shown step by step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmphi.benchmarks._qlora_models import SHAPES, Shape, prepare, step_flops
from mmphi.benchmarks._qlora_sides import mmphi_side, peft_side

SIDES = {"peft": peft_side, "mmphi": mmphi_side}


def run_side(side: str, folder: Path, shape: str, steps: int, profiled: bool = False) -> dict[str, Any]:
    """Losses, seconds of each timed step, peak memory of one side, and what its last step spent its time on."""
    from mmphi.training.meters import peak_memory_bytes

    watch = []
    if profiled:
        from mmphi.benchmarks._profile import LastStep

        watch = [LastStep(steps)]
    clock = SIDES[side](folder, SHAPES[shape], steps, watch)
    timed = clock.seconds()[1 : -1 if profiled else None]
    found = {"losses": clock.losses, "seconds": timed, "memory_gb": peak_memory_bytes() / 1e9}
    return found | {"profile": "".join(step.table for step in watch)}


def main(arguments: Sequence[str]) -> int:
    """``mmphi benchmark qlora``."""
    parser = argparse.ArgumentParser(prog="mmphi benchmark qlora", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="small", choices=list(SHAPES), help="sizes of models and batch [small]")
    parser.add_argument("--steps", type=int, default=5, help="steps of each side; the first is not timed [5]")
    parser.add_argument("--rounds", type=int, default=2, help="times that each side runs, in turn [2]")
    parser.add_argument(
        "--profile", action="store_true", help="show what each side's last step does (torch.profiler); it is not timed"
    )
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(list(arguments))
    if options.side == "prepare":
        prepare(options.folder, SHAPES[options.shape], options.steps)
        print("{}")
        return 0
    if options.side:
        print(json.dumps(run_side(options.side, options.folder, options.shape, options.steps, options.profile)))
        return 0
    if options.steps < 2 + options.profile:
        parser.error("--steps: one more at least, because the first is not timed, nor one that is profiled")
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_process("prepare", folder, options.shape, options.steps)  # So that it leaves a GPU's memory free.
        batches = json.loads((folder / "rows.json").read_text())
        for _ in range(options.rounds):
            for side in SIDES:
                found[side].append(in_process(side, folder, options.shape, options.steps, options.profile))
    print(f"shape {options.shape}: {asdict(SHAPES[options.shape])}")
    show(found, SHAPES[options.shape], batches)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def in_process(side: str, folder: Path, shape: str, steps: int, profiled: bool = False) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [sys.executable, "-m", "mmphi", "benchmark", "qlora", "--side", side, "--folder", str(folder)]
    command += ["--shape", shape, "--steps", str(steps), *(["--profile"] if profiled else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def show(found: Mapping[str, list[dict[str, Any]]], shape: Shape, batches: Sequence[Sequence[Any]]) -> None:
    """Print the sides beside one another: medians over all timed steps.

    Args:
        found: Rounds of each side.
        shape: Of the models.
        batches: Rows of each step.
    """
    from mmphi.models.language import DTYPES
    from mmphi.training.hardware import peak

    def seconds(side: str) -> float:
        return float(statistics.median(s for run in found[side] for s in run["seconds"]))

    timed = batches[1 : 1 + len(found["mmphi"][0]["seconds"])]
    tokens = statistics.mean(sum(sum(row["supervised"]) for row in batch) for batch in timed)
    flops, fastest = statistics.mean(step_flops(shape, batch) for batch in timed), peak(dtype=DTYPES[shape.precision])
    print(f"{'side':8} {'supervised tokens/s':>20} {'s/step':>8} {'mmphi is':>9} {'MFU':>6} {'peak GB':>8}  losses")
    for side, runs in found.items():
        memory = max(run["memory_gb"] for run in runs)
        losses = " ".join(f"{loss:.4f}" for loss in runs[0]["losses"][:5])
        ratio, share = f"{seconds(side) / seconds('mmphi'):.2f}x", flops / seconds(side) / fastest.flops
        speeds = f"{tokens / seconds(side):20,.0f} {seconds(side):8.3f} {ratio:>9} {share:6.1%}"
        print(f"{side:8} {speeds} {memory:8.2f}  {losses}")
    print(f"MFU: of {fastest.name}; padding and recomputing count nothing")
    for side, runs in found.items():
        if runs[-1]["profile"]:
            print(f"\nThe last step of {side}:\n{runs[-1]['profile']}")
