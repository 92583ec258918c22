"""``mmphi evaluate --harness lmms-eval``: published benchmarks on any model, tracked as a separate run."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mmphi.config.arguments import CommandParser
from mmphi.errors import MmphiError, SettingsError

STAGE = "harness"
COUNTS = ("samples", "sample_len")
INSTALL = "pip install 'lmms-eval>=0.7' (it brings 59 packages and an older av: an environment of its own is best)"


def main(arguments: Sequence[str]) -> int:
    """Run ``mmphi evaluate --harness``."""
    parser = CommandParser(
        prog="mmphi evaluate --harness lmms-eval",
        description="Run published benchmarks of lmms-eval on a model, and record the results.",
    )
    parser.add_argument("--harness", required=True, choices=("lmms-eval",), help="harness that runs the benchmarks")
    parser.add_argument("--model", required=True, help="folder, run or registered name of a model")
    parser.add_argument("--tasks", required=True, help="names of tasks, by commas: pope,textvqa_val,vqav2_val")
    parser.add_argument("--limit", type=int, default=0, help="questions of each task; 0 asks all [0]")
    parser.add_argument("--batch_size", type=int, default=32, help="answers generated at once [32]")
    parser.add_argument("--include", default="", help="folder with tasks of your own")
    options = parser.parse_args(list(arguments))
    if importlib.util.find_spec("lmms_eval") is None:
        raise SettingsError("lmms-eval is not installed here", INSTALL)
    tasks = [name.strip() for name in options.tasks.split(",") if name.strip()]
    results = evaluated(options.model, tasks, options.limit, options.batch_size, options.include)
    figures = figures_of(results)
    run_id, address = record(options, figures, results.get("n-samples", {}))
    for name, value in figures.items():
        print(f"{name:<48} {value:.4f}")
    print(f"run {run_id}\npage at {address}\n`mmphi report benchmarks` compares it with published figures")
    return 0


def evaluated(model: str, tasks: Sequence[str], limit: int, batch_size: int, include: str) -> Mapping[str, Any]:
    """Results of lmms-eval.

    Raises:
        SettingsError: If a task does not exist.
        MmphiError: If lmms-eval returns no results.
    """
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from mmphi.serving.harness.lmms import Mmphi

    manager = TaskManager(include_path=include or None)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        from mmphi.config.messages import did_you_mean

        near = did_you_mean(unknown[0], manager.all_tasks)
        hint = f"did you mean {near}?" if near else "`python -m lmms_eval --tasks list` lists them"
        raise SettingsError(f"lmms-eval has no task {unknown[0]!r}", hint)
    found: Mapping[str, Any] = simple_evaluate(
        model=Mmphi(model, batch_size),
        model_args={"pretrained": model},
        tasks=list(tasks),
        limit=limit or None,
        batch_size=batch_size,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=0,
        cli_args=argparse.Namespace(process_with_media=False, output_path=None),
    )
    if not found:
        raise MmphiError("lmms-eval returned no results", "see what it printed above")
    return found


def figures_of(results: Mapping[str, Any]) -> dict[str, float]:
    """Values by ``task/metric``, without lmms-eval's filter suffixes, standard errors and sample counts."""
    found: dict[str, float] = {}
    for task, values in results["results"].items():
        for name, value in values.items():
            metric, _, _ = name.partition(",")
            if isinstance(value, int | float) and not metric.endswith("_stderr") and metric not in COUNTS:
                found[f"{task}/{metric}"] = float(value)
    return found


def record(
    options: argparse.Namespace, figures: Mapping[str, float], counts: Mapping[str, Mapping[str, int]]
) -> tuple[str, str]:
    """Record results as a new run; returns its ID and address.

    Args:
        options: Parsed options of the command.
        figures: Values by ``task/metric``.
        counts: Numbers of questions of each task, ``original`` and ``effective``.
    """
    from mmphi.tracking.run_writer import TrackingStore

    store = TrackingStore()
    tags = {"mmphi.stage": STAGE, "mmphi.model": options.model, "mmphi.limit": str(options.limit)}
    tags["mmphi.questions"] = json.dumps({task: count.get("effective", 0) for task, count in counts.items()})
    tracker = store.begin(f"lmms-eval {options.tasks}", tags)
    tracker.metrics({f"lmms/{name}": value for name, value in figures.items()})
    store.finish(tracker)
    return tracker.run_id, store.address(tracker.run_id)
