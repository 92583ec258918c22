"""Common part of ``mmphi benchmark projector`` and ``qlora``: sides in separate processes, and their comparison."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmphi.benchmarks._conversation_sides import Batches
from mmphi.benchmarks._conversations import Shape, prepare, step_flops
from mmphi.benchmarks._pretrain_sides import Clock
from mmphi.benchmarks._process import in_process

# Largest difference between the losses of two sides, in nats per token. In bf16, rounding accumulates over the steps.
TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2}
OURS = "mmphi"


@dataclass(frozen=True)
class Side:
    """One implementation of the training.

    Attributes:
        run: Trains, given the folder, the shape, the batches, the number of workers and callbacks.
        by_length: Whether rows are sorted by length, so that those of a batch have nearly equal lengths.
        same: Name of the side that must have the same losses; empty for none.
    """

    run: Callable[[Path, Shape, Batches, int, Sequence[Any]], Clock]
    by_length: bool = False
    same: str = ""


@dataclass(frozen=True)
class Comparison:
    """A benchmark of several sides.

    Attributes:
        name: Name after ``mmphi benchmark``.
        help: Description in one line.
        sides: Sides by name, one of which is ``mmphi``.
        shapes: Sizes of models and batch, by name.
        outside: Description of the work that is not timed.
    """

    name: str
    help: str
    sides: Mapping[str, Side]
    shapes: Mapping[str, Shape]
    outside: str

    def run_side(self, side: str, folder: Path, shape: str, workers: int = 0, profiled: bool = False) -> dict[str, Any]:
        """Losses, time, supervised tokens and FLOPs of the steps, peak memory, and the profile of the last step."""
        from mmphi.training.throughput import peak_memory_bytes

        batches = batches_of(folder, by_length=self.sides[side].by_length)
        watch = []
        if profiled:
            from mmphi.benchmarks._profile import LastStep

            watch = [LastStep(len(batches))]
        clock = self.sides[side].run(folder, self.shapes[shape], batches, workers, watch)
        timed = slice(1, -1 if profiled else None)
        flops = [step_flops(self.shapes[shape], batch) for batch in batches]
        return {
            "losses": clock.losses,
            "seconds": clock.seconds()[timed],
            "tokens": [sum(sum(row["supervised"]) for row in batch) for batch in batches][timed],
            "flops": flops[timed],
            "memory_gb": peak_memory_bytes() / 1e9,
            "profile": "".join(step.table for step in watch),
        }

    def main(self, arguments: Sequence[str]) -> int:
        """Run the benchmark; returns the exit status, 1 if losses differ that should be equal."""
        parser = argparse.ArgumentParser(prog=f"mmphi benchmark {self.name}", description=self.help)
        shapes, spare = list(self.shapes), min(4, (os.cpu_count() or 1) // 4)
        parser.add_argument("--shape", default="small", choices=shapes, help="sizes of models and batch [small]")
        parser.add_argument("--steps", type=int, default=6, help="steps of each side; the first is not timed [6]")
        parser.add_argument("--rounds", type=int, default=2, help="times that each side runs, in turn [2]")
        parser.add_argument(
            "--workers",
            type=int,
            default=spare,
            help="processes that load, on each side [a fourth of the cores, up to 4]",
        )
        parser.add_argument("--without", nargs="+", default=[], choices=list(self.sides), help="sides to leave out")
        parser.add_argument(
            "--profile", action="store_true", help="show what each side's last step does (torch.profiler); untimed"
        )
        parser.add_argument("--json", type=Path, help="file for all figures")
        parser.add_argument("--side", default="", help=argparse.SUPPRESS)
        parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
        options = parser.parse_args(list(arguments))
        if options.side == "prepare":
            prepare(options.folder, self.shapes[options.shape], options.steps)
            print("{}")
            return 0
        if options.side:
            found = self.run_side(options.side, options.folder, options.shape, options.workers, options.profile)
            print(json.dumps(found))
            return 0
        if options.steps < 2 + options.profile:
            parser.error("--steps: one more at least, because the first is not timed, nor one that is profiled")
        sides = [side for side in self.sides if side not in options.without]
        rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        with tempfile.TemporaryDirectory() as name:
            own = ["--folder", name, "--shape", options.shape, "--workers", str(options.workers)]
            # In a separate process, so that it frees the GPU's memory.
            in_process("--side prepare", self.name, ["--side", "prepare", *own, "--steps", str(options.steps)])
            for _ in range(options.rounds):
                for side in sides:
                    part = ["--side", side, *own, *["--profile"] * options.profile]
                    rounds[side].append(in_process(f"--side {side}", self.name, part))
        print(f"shape {options.shape}: {asdict(self.shapes[options.shape])}\noutside the clock: {self.outside}")
        show(rounds, self.shapes[options.shape].precision)
        wrong = self.unequal(rounds, TOLERANCE[self.shapes[options.shape].precision])
        for line in wrong:
            print(line, file=sys.stderr)
        if options.json:
            options.json.write_text(json.dumps(rounds, indent=1) + "\n")
        return 1 if wrong else 0

    def unequal(self, rounds: Mapping[str, Sequence[Mapping[str, Any]]], allowed: float) -> list[str]:
        """One message for each run of a side whose losses should equal those of another and do not."""
        wrong = []
        for name, side in self.sides.items():
            if not side.same or name not in rounds or side.same not in rounds:
                continue
            for ours, theirs in zip(rounds[name], rounds[side.same], strict=True):
                if difference := loss_difference(ours["losses"], theirs["losses"], allowed):
                    wrong.append(f"losses of {name} and {side.same} {difference}")
        return wrong


def batches_of(folder: Path, *, by_length: bool) -> Batches:
    """Rows of each step, in their original order or in shuffled batches of rows sorted by length."""
    import numpy as np

    batches: list[list[Any]] = json.loads((folder / "rows.json").read_text())
    if not by_length:
        return batches
    size = len(batches[0])
    rows = sorted((row for batch in batches for row in batch), key=lambda row: len(row["ids"]))
    order = np.random.default_rng(0).permutation(len(batches))
    return [rows[i * size : (i + 1) * size] for i in order]


def loss_difference(one: Sequence[float], other: Sequence[float], allowed: float) -> str:
    """Text about the step at which the losses of two sides differ most; empty if all differences are allowed."""
    differ = [abs(a - b) for a, b in zip(one, other, strict=True)]
    if all(each <= allowed for each in differ):  # False if a loss is NaN.
        return ""
    step = max(range(len(differ)), key=lambda i: differ[i])
    return (
        f"differ by {differ[step]:.2g} nats/token at step {step + 1}; at most {allowed:g} is rounding: they do not"
        " train the same"
    )


def show(rounds: Mapping[str, Sequence[Mapping[str, Any]]], precision: str) -> None:
    """Print a table of the sides: supervised tokens of all timed steps per second, median of the rounds.

    Args:
        rounds: Measurements of each round, by side.
        precision: Precision of the language model.
    """
    from mmphi.models.language.language_model import DTYPES
    from mmphi.training.peak_flops import peak_flops

    fastest = peak_flops(dtype=DTYPES[precision])

    def rates(side: str) -> list[float]:
        return [sum(run["tokens"]) / sum(run["seconds"]) for run in rounds[side]]

    width = max(map(len, rounds)) + 1
    columns = f"{'supervised tokens/s':>20} {'s/step':>8} {f'{OURS} is':>14} {'MFU':>6} {'peak GB':>8}"
    print(f"{'side':{width}} {columns}  losses")
    for side, runs in rounds.items():
        seconds = [sum(run["seconds"]) for run in runs]
        share = statistics.median(sum(run["flops"]) for run in runs) / statistics.median(seconds) / fastest.flops
        step = statistics.median(seconds) / len(runs[0]["seconds"])
        pairs = zip(rates(OURS), rates(side), strict=True) if OURS in rounds else ()
        ratio = " ".join(f"{ours / theirs:.2f}x" for ours, theirs in pairs)
        losses = " ".join(f"{loss:.4f}" for loss in runs[0]["losses"][:5])
        figures = f"{statistics.median(rates(side)):20,.0f} {step:8.3f} {ratio:>14} {share:6.1%}"
        print(f"{side:{width}} {figures} {max(run['memory_gb'] for run in runs):8.2f}  {losses}")
    print(f"MFU: of {fastest.name}; padding and recomputing count nothing")
    for side, runs in rounds.items():
        if runs[-1]["profile"]:
            print(f"\nThe last step of {side}:\n{runs[-1]['profile']}")
