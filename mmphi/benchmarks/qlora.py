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

from mmphi.benchmarks._qlora_models import SHAPES, prepare
from mmphi.benchmarks._qlora_sides import mmphi_side, peft_side

SIDES = {"peft": peft_side, "mmphi": mmphi_side}


def run_side(side: str, folder: Path, shape: str, steps: int) -> dict[str, Any]:
    """Losses, seconds of each step, and peak memory of one side."""
    from mmphi.training.meters import peak_memory_bytes

    clock = SIDES[side](folder, SHAPES[shape], steps)
    return {"losses": clock.losses, "seconds": clock.seconds(), "memory_gb": peak_memory_bytes() / 1e9}


def main(arguments: Sequence[str]) -> int:
    """``mmphi benchmark qlora``."""
    parser = argparse.ArgumentParser(prog="mmphi benchmark qlora", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="small", choices=list(SHAPES), help="sizes of models and batch [small]")
    parser.add_argument("--steps", type=int, default=5, help="steps of each side; the first is not timed [5]")
    parser.add_argument("--rounds", type=int, default=2, help="times that each side runs, in turn [2]")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(list(arguments))
    if options.side:
        print(json.dumps(run_side(options.side, options.folder, options.shape, options.steps)))
        return 0
    if options.steps < 2:
        parser.error("--steps: two at least, because the first is not timed")
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, SHAPES[options.shape], options.steps)
        batches = json.loads((folder / "rows.json").read_text())
        for _ in range(options.rounds):
            for side in SIDES:
                found[side].append(in_process(side, folder, options.shape, options.steps))
    print(f"shape {options.shape}: {asdict(SHAPES[options.shape])}")
    show(found, [sum(sum(row["supervised"]) for row in batch) for batch in batches])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def in_process(side: str, folder: Path, shape: str, steps: int) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [sys.executable, "-m", "mmphi", "benchmark", "qlora", "--side", side, "--folder", str(folder)]
    done = subprocess.run([*command, "--shape", shape, "--steps", str(steps)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def show(found: Mapping[str, list[dict[str, Any]]], supervised: Sequence[int]) -> None:
    """Print the sides beside one another: medians over all timed steps.

    Args:
        found: Rounds of each side.
        supervised: Tokens learned from in each step.
    """

    def seconds(side: str) -> float:
        return float(statistics.median(s for run in found[side] for s in run["seconds"][1:]))

    tokens = statistics.mean(supervised[1:])
    print(f"{'side':8} {'supervised tokens/s':>20} {'s/step':>8} {'mmphi is':>9} {'peak GB':>8}  losses")
    for side, runs in found.items():
        memory = max(run["memory_gb"] for run in runs)
        losses = " ".join(f"{loss:.4f}" for loss in runs[0]["losses"][:5])
        ratio = f"{seconds(side) / seconds('mmphi'):.2f}x"
        print(f"{side:8} {tokens / seconds(side):20,.0f} {seconds(side):8.2f} {ratio:>9} {memory:8.2f}  {losses}")
