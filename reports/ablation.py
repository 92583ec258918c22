"""The report of an ablation, from the tracking store alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mmphi.errors import StoreError
from reports import figures, prose
from reports.document import Document
from reports.query import StudyData
from reports.statistics import Comparison, Interval, compare, interval, shares
from reports.tables import mean_of, tables
from reports.verdict import Metric, headline, sentence

CURVE = "val/loss"
SHOWN_COSTS = ("projector/parameters", "cost/first_token_s")  # Against these the metric is drawn.


def ablation(data: StudyData) -> Document:
    """The report of a study.

    Args:
        data: As the store has it, with the curves of :data:`CURVE`.

    Raises:
        StoreError: If no trial has what is judged; says what the trials do have.
    """
    declared = data.declaration
    metric = Metric(declared["metric"], declared["unit"], declared["direction"] == "minimize", declared["margin"])
    values = data.values(metric.name)
    _some(data, metric, values)
    baseline = declared["baseline"]
    comparisons = compare({level: values[level] for level in data.levels}, baseline, metric.margin)
    intervals = {level: interval(list(of.values())) for level, of in values.items()}
    means = {level: float(np.mean(list(of.values()))) for level, of in values.items() if of}
    document = Document(
        "ablation.md.j2",
        f"Ablation {data.name}",
        {
            "study": data.name,
            "question": declared["question"],
            "headline": headline(comparisons, means, baseline, metric),
            "sentences": [sentence(c, baseline, metric) for c in comparisons] if len(comparisons) > 1 else [],
            "design": prose.design(data),
            "leaves_open": declared.get("leaves_open", ""),
            "warnings": list(prose.warnings(data, metric)),
            "budget": prose.budget(data, metric),
            "statistics": prose.STATISTICS,
            "costs_note": prose.COSTS_NOTE,
            "held": prose.held(data),
            "tuning_notes": list(prose.tuning_notes(data)),
            "failures": prose.failures(data),
            "command": prose.command(data),
        },
    )
    document.tables |= tables(data, metric, comparisons, intervals, means)
    document.figures |= drawn(data, metric, comparisons, intervals, means)
    parts = shares({level: of for level, of in values.items() if of})
    if parts and len(data.levels) > 1:
        document.figures["importance"] = figures.png(figures.importance(parts))
        document.values = {**document.values, "importance": prose.importance(parts.factor, parts.seed, parts.rest)}
    return document


def _some(data: StudyData, metric: Metric, values: Mapping[str, Mapping[int, float]]) -> None:
    if any(values.values()):
        return
    finished = [t for t in data.trials if t.phase == "verdict" and t.finished]
    if not finished:
        raise StoreError(f"no trial of the study {data.name} is finished", f"mmphi ablate {data.name} goes on with it")
    there = sorted({name for t in finished for name in t.metrics if "/" in name})
    raise StoreError(f"no run of the study {data.name} has the metric {metric.name}", f"they have {', '.join(there)}")


def drawn(
    data: StudyData,
    metric: Metric,
    comparisons: Sequence[Comparison],
    intervals: Mapping[str, Interval | None],
    means: Mapping[str, float],
) -> dict[str, bytes]:
    """The figures, by name."""
    baseline, results = data.declaration["baseline"], data.results("verdict", metric.name)
    made = {}
    with_pairs = [c for c in comparisons if c.n]
    if with_pairs:
        made["effects"] = figures.png(figures.effects(with_pairs, baseline, metric))
    made["seeds"] = figures.png(figures.seeds(data.values(metric.name), intervals, metric))
    curves = {level: [data.curves.get(t.run_id, []) for t in of.values()] for level, of in results.items()}
    if any(len(run) > 1 for runs in curves.values() for run in runs):
        made["curves"] = figures.png(figures.curves(curves, baseline, CURVE, metric.unit))
    costs: dict[str, dict[str, tuple[float, float]]] = {}
    for name in SHOWN_COSTS:
        points = {level: (mean_of(results[level], name), means[level]) for level in means}
        there = {level: (x, y) for level, (x, y) in points.items() if x}
        if there and name in data.declaration["costs"]:
            costs[data.declaration["costs"][name]] = there
    if costs:
        made["tradeoffs"] = figures.png(figures.tradeoffs(costs, metric))
    return made
