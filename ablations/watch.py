"""Progress of a study: means so far, intervals, differences to the baseline, finished seeds, time left."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import numpy as np

from mmphi.describe import duration
from reports.comparison import compare
from reports.paired_tests import interval
from reports.search import search_trials
from reports.study_query import StudyData, load_study
from reports.verdict import format_interval, format_number

if TYPE_CHECKING:
    from mmphi.tracking.run_store import RunStore

CLEAR = "\x1b[H\x1b[2J"
LAST = 12  # Number of latest trials that the remaining time is estimated from.


def progress_table(data: StudyData) -> str:
    """Text table of the results of a study or search so far."""
    if data.declaration.get("kind") == "search":
        return _search_table(data)
    metric, baseline = data.declaration["metric"], data.declaration["baseline"]
    values = data.values(metric)
    comparisons = {c.level: c for c in compare({level: values[level] for level in data.levels}, baseline)}
    rows = [("level", "seeds", f"mean {metric}", "95 % interval", f"minus {baseline}", "95 % interval")]
    for level in data.levels:
        found = list(values[level].values())
        comparison = comparisons.get(level)
        mark = " (baseline)" if level == baseline else " (stopped)" if level in data.stopped else ""
        known = comparison is not None and comparison.n
        rows.append(
            (
                level + mark,
                f"{len(found)}/{data.seeds}",
                format_number(float(np.mean(found)), 4) if found else "-",
                format_interval(interval(found)),
                format_number(comparison.difference) if comparison and known else "-",
                format_interval(comparison.interval) if comparison else "-",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([data.declaration["question"], "", *lines, "", progress_line(data)])


def _search_table(data: StudyData) -> str:
    trials, objectives = search_trials(data), list(data.declaration["objectives"])
    best = sorted(trials, key=lambda t: t.mean(objectives[0]))
    if data.declaration["objectives"][objectives[0]] == "maximize":
        best.reverse()
    lines = []
    for t in best:
        settings = ", ".join(f"{name} {value}" for name, value in t.params.items())
        means = ", ".join(f"{o} {format_number(t.mean(o), 4)}" for o in objectives)
        lines.append(f"{t.name:<10} {means}  {settings}{f'  ({t.pruned})' if t.pruned else ''}")
    return "\n".join([data.declaration["question"], "", *lines, "", progress_line(data)])


def progress_line(data: StudyData) -> str:
    """One line with finished, running and missing trials, and the time left at the rate of the last trials."""
    if data.declaration.get("kind") == "search":
        return f"{len(search_trials(data))} of {data.declaration['trials']} trials begun"
    running = [t for t in data.trials if t.status == "RUNNING"]
    tuning = sum(t.finished and t.phase == "tuning" for t in data.trials)
    missing = data.missing()
    parts = [f"{len(missing)} verdict trials to go" if missing else "all verdict trials are done"]
    parts += [f"{tuning} tuning trials done"] if tuning else []
    parts += [f"{len(running)} running"] if running and missing else []
    parts += [f"{len(data.failed())} without a result"] if data.failed() else []
    begun = sorted(t.started_ms for t in data.trials if t.finished or t.status == "RUNNING")[-LAST:]
    if missing and running and len(begun) > 2:
        parts.append(f"about {duration(len(missing) * (begun[-1] - begun[0]) / 1000 / (len(begun) - 1))} left")
    return ", ".join(parts)


def watch(store: RunStore, name: str, every_s: float = 5.0) -> None:
    """Print the progress table every ``every_s`` seconds until the study is complete."""
    while True:
        data = load_study(store, name)
        shown = progress_table(data)
        print(f"{CLEAR if sys.stdout.isatty() else ''}{shown}", flush=True)
        search = data.declaration.get("kind") == "search"
        if data.status == "FINISHED" if search else not data.missing():
            return
        time.sleep(every_s)
