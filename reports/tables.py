"""Tables of an ablation report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from reports.paired_tests import interval
from reports.render import ReportTable
from reports.study_query import StudyData, Trial
from reports.study_results import StudyResults
from reports.verdict import format_interval, format_number, format_p

# Columns of each level: interval of its mean, then its comparison with the baseline.
LEVEL_COLUMNS = ("95 % interval", "minus the baseline", "95 % interval of it", "p (Holm)", "verdict", "tokens")


def report_tables(found: StudyResults) -> dict[str, ReportTable]:
    """Tables of the report, by name."""
    data, metric, declared = found.data, found.metric, found.data.declaration
    comparisons = {c.level: c for c in found.comparisons}
    rows, costs = [], []
    against: list[str]
    for level in data.levels:
        trials, comparison = {n: found.results[level][n] for n in found.judged[level]}, comparisons.get(level)
        mean = format_number(found.means[level], 4) if level in found.means else "-"
        if comparison is None or comparison.n == 0:
            against = ["baseline" if level == found.baseline else "-", "-", "-", "-"]
        else:
            against = [
                format_number(comparison.difference),
                format_interval(comparison.interval),
                "-" if comparison.interim else format_p(comparison.p).removeprefix("p = "),
                comparison.verdict,
            ]
        tokens = mean_of(trials, f"{declared['stage']}/supervised_tokens")
        around = format_interval(found.intervals[level])
        rows.append([level, len(trials), mean, around, *against, f"{tokens:,.0f}" if tokens else "-"])
        costs.append([level, *(_cost(median_of(trials, name)) for name in declared["costs"])])
    made = {
        "levels": ReportTable([declared["factor"], "n", f"mean {metric.name}", *LEVEL_COLUMNS], rows),
        "robustness": robustness(found),
        "costs": ReportTable([declared["factor"], *declared["costs"].values()], costs),
        "trials": seed_table(found),
        "environment": environment(data),
    }
    made |= _tuning(data) | _also(found) | _exploratory(found)
    if failed := data.failed():
        made["failed"] = ReportTable(
            ["phase", "level", "seed", "status", "reason", "run"],
            [[t.phase, t.level, t.seed, t.status, t.reason or "-", run_link(data, t)] for t in failed],
        )
    if data.changes:
        made["changes"] = ReportTable(
            ["when (UTC)", "what", "level", "value"],
            [[c["at"], c["what"], c["name"], "-" if c["value"] is None else c["value"]] for c in data.changes],
        )
    return made


def robustness(found: StudyResults) -> ReportTable:
    """Table of alternative estimates of the differences, and of the runs excluded from them."""
    rows = [
        [
            c.level,
            c.n,
            format_number(c.difference),
            format_number(c.hodges_lehmann),
            format_interval(c.without_one),
            f"{c.lost[0]} and {c.lost[1]}",
            format_p(c.p_lost).removeprefix("p = ") if any(c.lost) else "-",
        ]
        for c in found.comparisons
    ]
    columns = ("pairs", "mean difference", "Hodges-Lehmann", "mean without any one pair")
    return ReportTable(
        [found.data.declaration["factor"], *columns, "runs lost, level and baseline", "p (McNemar)"], rows
    )


def _also(found: StudyResults) -> dict[str, ReportTable]:
    """Table of quality metrics that are not judged: means and intervals."""
    also, rows = found.data.declaration.get("also", {}), []
    for level in found.data.levels:
        row: list[Any] = [level]
        for name in also:
            of = {n: found.results[level][n].metrics.get(name) for n in found.judged[level]}
            values = [value for value in of.values() if value is not None]
            row.append(
                f"{format_number(float(np.mean(values)), 4)} ({format_interval(interval(values))})" if values else "-"
            )
        rows.append(row)
    return {"also": ReportTable([found.data.declaration["factor"], *also.values()], rows)} if also else {}


def _exploratory(found: StudyResults) -> dict[str, ReportTable]:
    """Table of the differences over all seeds, if there are more than the study declared."""
    rows = [[c.level, c.n, format_number(c.difference), format_interval(c.interval)] for c in found.exploratory]
    columns = [found.data.declaration["factor"], "pairs", "minus the baseline", "95 % interval"]
    return {"exploratory": ReportTable(columns, rows)} if rows else {}


def run_link(data: StudyData, trial: Trial) -> str:
    """Markdown link to a run, titled with the first 8 characters of its id."""
    return f"[{trial.run_id[:8]}]({data.link(trial.run_id)})"


def seed_table(found: StudyResults) -> ReportTable:
    """Table of the metric of each trial, one seed per row, linked to the runs."""
    data, metric, results = found.data, found.metric, found.results
    numbers = sorted({n for of in results.values() for n in of})

    def cell(level: str, n: int) -> str:
        trial = results[level].get(n)
        if trial is None:
            return "-"
        left_out = " diverged" if n in found.lost[level] else ""
        return f"[{format_number(trial.metrics[metric.name], 4)}]({data.link(trial.run_id)}){left_out}"

    rows = [[n, *(cell(level, n) for level in data.levels)] for n in numbers]
    return ReportTable(["seed", *data.levels], rows)


def _cost(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else format_number(value, 3)


def _tuning(data: StudyData) -> dict[str, ReportTable]:
    if not data.declaration["nuisance"]:
        return {}
    rows = []
    for level in data.levels:
        shown = [
            f"{', '.join(map(str, values))}: {format_number(float(np.mean(of)), 4)}"
            + (f" ({format_number(min(of), 4)} to {format_number(max(of), 4)})" if len(of) > 1 else "")
            for values, of in tried_at(data, level)
        ]
        used = [", ".join(map(str, values)) for values in used_at(data, level)]
        rows.append([level, " and ".join(used) or "-", "; ".join(shown) or "-"])
    names = ", ".join(data.declaration["nuisance"])
    return {
        "tuning": ReportTable(
            [data.declaration["factor"], f"{names} used", f"mean {data.declaration['tuning_metric']} at each (range)"],
            rows,
        )
    }


def used_at(data: StudyData, level: str) -> list[tuple[str, ...]]:
    """Distinct nuisance values of the verdict trials of a level; several only if the level was tuned again."""
    names = list(data.declaration["nuisance"])
    trials = data.results("verdict")[level].values()
    return sorted({tuple(str(trial.params.get(name, "?")) for name in names) for trial in trials})


def failed_at(data: StudyData, level: str) -> list[tuple[str, ...]]:
    """Nuisance values at a level of which at least one tuning trial failed."""
    names = list(data.declaration["nuisance"])
    ended = [t for t in data.trials if t.phase == "tuning" and t.level == level and t.status == "FAILED"]
    return [tuple(str(trial.params.get(name, "?")) for name in names) for trial in ended]


def tried_at(data: StudyData, level: str) -> list[tuple[tuple[str, ...], list[float]]]:
    """Nuisance values tried at a level, each with the tuning metric at its seeds, in order of the values."""
    names, metric = list(data.declaration["nuisance"]), data.declaration["tuning_metric"]
    found: dict[tuple[str, ...], list[float]] = {}
    for trial in data.trials:
        if trial.phase == "tuning" and trial.level == level and trial.finished and metric in trial.metrics:
            found.setdefault(tuple(str(trial.params.get(n, "?")) for n in names), []).append(trial.metrics[metric])
    return sorted(found.items(), key=lambda item: order_of(item[0]))


def order_of(values: Sequence[Any]) -> tuple[Any, ...]:
    """Sort key of values of settings: numeric if all are numbers, else alphabetical."""
    try:
        return tuple(float(v) for v in values)
    except ValueError:
        return tuple(map(str, values))


def environment(data: StudyData) -> ReportTable:
    """Table of the commits, machines and data of the trials."""
    trials = [t for t in data.trials if t.finished]
    hours = sum(t.metrics.get("seconds", 0.0) for t in trials) / 3600
    rows = [["trials", f"{len(trials)} finished, {hours:.2f} hours of training"]]
    for title, tag in (
        ("commit", "mmphi.git_commit"),
        ("uncommitted changes", "mmphi.git_dirty"),
        ("processor", "mmphi.cpu"),
        ("cores", "mmphi.cores"),
        ("GPU", "mmphi.gpu"),
        ("memory, GB", "mmphi.memory_gb"),
        ("stage version", "mmphi.version"),
    ):
        if seen := sorted({t.tags[tag] for t in trials if tag in t.tags}):
            rows.append([title, ", ".join(seen)])
    digests = {
        (tag.removeprefix("mmphi.data."), value)
        for t in trials
        for tag, value in t.tags.items()
        if tag.startswith("mmphi.data.")
    }
    rows += [[f"digest of {name}", value] for name, value in sorted(digests)]
    upstream: dict[str, set[str]] = {}
    for trial in trials:
        for tag, run_id in trial.tags.items():
            if tag.startswith("mmphi.upstream."):
                upstream.setdefault(tag.removeprefix("mmphi.upstream."), set()).add(run_id)
    for name, runs in sorted(upstream.items()):
        only = f"[{next(iter(runs))[:8]}]({data.link(next(iter(runs)))})" if len(runs) == 1 else f"{len(runs)} runs"
        rows.append([f"built on {name}", only])
    return ReportTable(["what", "value"], rows)


def is_noise(levels: Iterable[Mapping[int, Trial]], name: str) -> bool:
    """Whether levels differ in a cost by less than twice its standard deviation over seeds.

    Args:
        levels: Trials of each level by seed.
        name: Name of the cost. A cost that is equal at all seeds of a level, such as parameters, is not noise.
    """
    values = [[t.metrics[name] for t in of.values() if name in t.metrics] for of in levels]
    variances = [float(np.var(of, ddof=1)) for of in values if len(of) > 1]
    medians = [float(np.median(of)) for of in values if of]
    return bool(variances) and max(medians) - min(medians) < 2 * float(np.sqrt(np.mean(variances)))


def mean_of(trials: Mapping[int, Trial], name: str) -> float | None:
    """Mean of a metric over the trials that have it; ``None`` if none has."""
    found = [t.metrics[name] for t in trials.values() if name in t.metrics]
    return float(np.mean(found)) if found else None


def median_of(trials: Mapping[int, Trial], name: str) -> float | None:
    """Median of a cost over trials, because times have outliers; ``seconds`` without resumed trials."""
    continued = name == "seconds"
    found = [
        t.metrics[name]
        for t in trials.values()
        if name in t.metrics and not (continued and "mmphi.continues" in t.tags)
    ]
    return float(np.median(found)) if found else None
