"""Pretraining steps of transformers' Trainer, a nanoGPT-style loop and mmphi: same Phi, initial weights and documents.

- ``padded``: transformers' Trainer with its defaults: one document per row, all documents of a step in one batch,
  padded to the longest;
- ``sorted``: the same Trainer; the documents of a step are sorted by length and processed in several passes (gradient
  accumulation), so that there is little padding;
- ``packed``: the same Trainer with transformers' packing (``DataCollatorWithFlattening``);
- ``loop``: an independent minimal loop in the style of nanoGPT, on rows that one document fills;
- ``loop-compiled``: the same under ``torch.compile``, which is nanoGPT's default;
- ``mmphi``: packed documents with attention inside each, fused head and loss, under the same Trainer;
- ``mmphi-compiled``: the same with ``compile: true`` and masked rows.

``padded``, ``sorted`` and ``packed`` are compared on documents of mixed lengths. The loops are compared on rows of one
document each, because they do not separate documents in a row. Each side runs in a separate process, so that its peak
memory is measured separately. Losses are compared step by step; if they differ by more than 0.001 nats per token (0.01
in bf16) the command fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmphi.benchmarks._pretrain_sides import SHAPES, Shape, loop_side, mmphi_side, positions, trainer_side
from mmphi.benchmarks._process import in_process
from mmphi.benchmarks._side_by_side import OURS, TOLERANCE, loss_difference

SIDES = {
    "mixed": ("padded", "sorted", "packed", OURS),
    "rows": ("loop", "loop-compiled", OURS, f"{OURS}-compiled"),
}


def run_side(side: str, kind: str, shape: Shape, steps: int) -> dict[str, Any]:
    """Losses and seconds of each step, peak memory in GB, and positions computed per token of one side."""
    from mmphi.training.throughput import peak_memory_bytes

    sides = {
        "padded": lambda: trainer_side(shape, steps, kind, "padded"),
        "sorted": lambda: trainer_side(shape, steps, kind, "sorted"),
        "packed": lambda: trainer_side(shape, steps, kind, "packed"),
        "loop": lambda: loop_side(shape, steps, kind),
        "loop-compiled": lambda: loop_side(shape, steps, kind, compiled=True),
        OURS: lambda: mmphi_side(shape, steps, kind),
        f"{OURS}-compiled": lambda: mmphi_side(shape, steps, kind, compiled=True),
    }
    clock = sides[side]()
    return {
        "losses": clock.losses,
        "seconds": clock.seconds(),
        "memory_gb": peak_memory_bytes() / 1e9,
        "positions_per_token": positions(shape, steps, kind, side) / (steps * shape.batch_tokens),
    }


def main(arguments: Sequence[str]) -> int:
    """Run ``mmphi benchmark pretrain``."""
    parser = argparse.ArgumentParser(prog="mmphi benchmark pretrain", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="10M", choices=list(SHAPES), help="sizes of model and batch [10M]")
    parser.add_argument("--steps", type=int, default=5, help="steps of each side; the first is not timed [5]")
    parser.add_argument("--rounds", type=int, default=2, help="times that each side runs, in turn [2]")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(list(arguments))
    shape = SHAPES[options.shape]
    if options.side:
        print(json.dumps(run_side(options.side, options.kind, shape, options.steps)))
        return 0
    if options.steps < 2:
        parser.error("--steps: two at least, because the first is not timed")
    names = [(kind, side) for kind, sides in SIDES.items() for side in sides]
    found: dict[str, list[dict[str, Any]]] = {f"{kind}/{side}": [] for kind, side in names}
    own = ["--shape", options.shape, "--steps", str(options.steps)]
    for _ in range(options.rounds):
        for kind, side in names:
            part = in_process(side, "pretrain", ["--side", side, "--kind", kind, *own])
            found[f"{kind}/{side}"].append(part)
    print(f"shape {options.shape}: {asdict(shape)}")
    for kind, sides in SIDES.items():
        show(kind, sides, found, shape)
    wrong = unequal(found, TOLERANCE[shape.precision])
    for line in wrong:
        print(line, file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if wrong else 0


def unequal(found: Mapping[str, list[dict[str, Any]]], allowed: float) -> list[str]:
    """One message for each run of a side whose losses differ from those of ``mmphi`` on the same documents."""
    wrong = []
    for name, runs in found.items():
        kind, _, side = name.partition("/")
        for theirs, ours in zip(runs, found[f"{kind}/{OURS}"], strict=True):
            if difference := loss_difference(theirs["losses"], ours["losses"], allowed):
                wrong.append(f"{kind}: losses of {side} and {OURS} {difference}")
    return wrong


def show(kind: str, sides: Sequence[str], found: Mapping[str, list[dict[str, Any]]], shape: Shape) -> None:
    """Print a table of the sides of one kind of batch: medians over all timed steps."""

    def seconds(side: str) -> float:
        return float(statistics.median(s for run in found[f"{kind}/{side}"] for s in run["seconds"][1:]))

    titles = {"mixed": "documents of mixed lengths", "rows": "rows of one document each"}
    columns = f"{'tokens/s':>10} {'mmphi is':>9} {'positions/token':>16} {'peak GB':>8}"
    print(f"\n{titles[kind]}\n{'side':15} {columns}  losses")
    for side in sides:
        memory = max(run["memory_gb"] for run in found[f"{kind}/{side}"])
        losses = " ".join(f"{loss:.4f}" for loss in found[f"{kind}/{side}"][0]["losses"][:5])
        ratio = f"{seconds(side) / seconds(OURS):.2f}x"
        computed = found[f"{kind}/{side}"][0]["positions_per_token"]
        rate = shape.batch_tokens / seconds(side)
        print(f"{side:15} {rate:10,.0f} {ratio:>9} {computed:16.2f} {memory:8.2f}  {losses}")
