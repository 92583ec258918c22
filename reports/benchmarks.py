"""The report of published benchmarks: results of this store compared with published results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmphi.errors import DataError
from mmphi.tracking.run_store import RunStore
from reports.references import FOLDER
from reports.render import ReportDocument, ReportTable

PREFIX = "lmms/"
COMMAND = "mmphi evaluate --harness lmms-eval --tasks {tasks} --model {model}{limit}"


@dataclass(frozen=True)
class Benchmarked:
    """Benchmark results of a model from an evaluation harness.

    Attributes:
        run_id: Id of the MLflow run.
        link: URL of the run in MLflow.
        model: Model as given on the command line.
        figures: Values by ``task/metric``.
        questions: Number of questions by task.
        limit: Maximum number of questions per task; 0 for all.
    """

    run_id: str
    link: str
    model: str
    figures: Mapping[str, float]
    questions: Mapping[str, int]
    limit: int


def load_benchmarked(store: RunStore) -> list[Benchmarked]:
    """Load all benchmark results of the store, newest first.

    Raises:
        DataError: If the store has none.
    """
    found = [
        Benchmarked(
            str(run.info.run_id),
            store.address(run.info.run_id),
            run.data.tags.get("mmphi.model", ""),
            {n.removeprefix(PREFIX): v for n, v in run.data.metrics.items() if n.startswith(PREFIX)},
            json.loads(run.data.tags.get("mmphi.questions", "{}")),
            int(run.data.tags.get("mmphi.limit", "0")),
        )
        for run in store.search("FINISHED", stage="harness")
    ]
    if not found:
        raise DataError(
            "no benchmark was run yet", COMMAND.format(tasks="pope,textvqa_val", model="RUN", limit="") + " runs two"
        )
    return found


def published(folder: Path = FOLDER) -> Mapping[str, Any]:
    """Published results, and the tasks of each benchmark.

    Raises:
        DataError: If the file cannot be read or is malformed.
    """
    try:
        content = dict(yaml.safe_load((folder / "benchmarks.yaml").read_text()))
        for entry in content["published"]:
            _ = entry["model"], entry["source"], entry["what"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise DataError(f"{folder}/benchmarks.yaml cannot be read: {error}", "fix the file there") from error
    return content


def benchmarks(runs: Sequence[Benchmarked], known: Mapping[str, Any]) -> ReportDocument:
    """Create the benchmark report.

    Args:
        runs: At least one result, newest first.
        known: Result of :func:`published`.
    """
    names = list(known["tasks"])
    rows = [
        [f"[{entry['model']}]({entry['source']})", entry["what"], *(_percent(entry.get(name)) for name in names)]
        for entry in known["published"]
    ]
    rows += [
        [f"[{run.model}]({run.link})", _extent(run), *(_reached(run, known, name) for name in names)] for run in runs
    ]
    figures = [[run.model, name, f"{value:.4f}"] for run in runs for name, value in sorted(run.figures.items())]
    newest = runs[0]
    limit = f" --limit {newest.limit}" if newest.limit else ""
    tasks = ",".join(newest.questions) or "pope"
    return ReportDocument(
        "benchmarks.md.j2",
        "Published benchmarks",
        {
            "headline": f"{newest.model}: "
            + ", ".join(f"{name} {value:.3f}" for name, value in sorted(newest.figures.items())),
            "command": COMMAND.format(tasks=tasks, model=newest.model, limit=limit) + "\nmmphi report benchmarks",
        },
        {
            "beside": ReportTable(["model", "of what", *names], rows),
            "figures": ReportTable(["model", "figure", "value"], figures),
        },
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _extent(run: Benchmarked) -> str:
    if not run.limit:
        return "this store"
    return "this store; " + ", ".join(f"{count} of {task}" for task, count in run.questions.items())


def _reached(run: Benchmarked, known: Mapping[str, Any], name: str) -> str:
    """Value of a run on a benchmark in percent; lmms-eval reports shares, but percentages for some tasks."""
    value = next((run.figures[task] for task in known["tasks"][name] if task in run.figures), None)
    if value is not None and value <= 1:
        value *= 100
    return _percent(value)
