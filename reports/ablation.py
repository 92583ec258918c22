"""The ablation report, from the tracking store alone."""

from __future__ import annotations

from reports import ablation_text, figures
from reports.paired_tests import variance_components
from reports.render import ReportDocument
from reports.study_query import StudyData
from reports.study_results import StudyResults
from reports.tables import is_noise, median_of, report_tables
from reports.verdict import format_verdict, headline

CURVES = "val/loss", "train/loss"  # In order of preference; the second if the first has too few values.
# Costs that the metric is plotted against.
SHOWN_COSTS = ("projector/parameters", "qlora/parameters", "val/text_loss", "cost/first_token_s")


FEWEST_POINTS = 3  # Minimum number of points of a curve for a figure.


def ablation_report(data: StudyData) -> ReportDocument:
    """Create the report of a study.

    Args:
        data: The study, loaded with curves of one of :data:`CURVES`.

    Raises:
        StoreError: If no trial has the judged metric; the message lists the metrics that exist.
    """
    found = StudyResults.of(data)
    metric, baseline, comparisons = found.metric, found.baseline, found.comparisons
    document = ReportDocument(
        "ablation.md.j2",
        f"Ablation {data.name}",
        {
            "study": data.name,
            "question": data.declaration["question"],
            "partial": ablation_text.missing_trials(data),
            "headline": headline(comparisons, baseline, metric),
            "sentences": [format_verdict(c, baseline, metric) for c in comparisons] if len(comparisons) > 1 else [],
            "design": ablation_text.design(data),
            "leaves_open": data.declaration.get("leaves_open", ""),
            "warnings": list(ablation_text.warnings(data, metric)),
            "exploratory": ablation_text.exploratory(found),
            "budget": ablation_text.budget(data, metric),
            "statistics": ablation_text.STATISTICS,
            "costs_note": ablation_text.costs_note(data, noisy_costs(found)),
            "held": ablation_text.held_fixed(data),
            "tuning_notes": list(ablation_text.tuning_notes(data)),
            "failures": ablation_text.failures(data),
            "command": ablation_text.command(data),
        },
    )
    document.tables |= report_tables(found)
    document.figures |= draw_figures(found)
    parts = variance_components({level: of for level, of in found.judged.items() if of})
    if parts and len(data.levels) > 1:
        document.figures["importance"] = figures.png(figures.importance(parts))
        document.values = {
            **document.values,
            "importance": ablation_text.importance_text(parts.factor, parts.seed, parts.rest),
        }
    return document


def titles(data: StudyData) -> dict[str, str]:
    """Titles of the costs and other metrics that a study declares, by metric name."""
    return {**data.declaration["costs"], **data.declaration.get("also", {})}


def noisy_costs(found: StudyResults) -> list[str]:
    """Titles of the costs that are not plotted because levels do not differ in them beyond the noise."""
    named = titles(found.data)
    return [named[name] for name in SHOWN_COSTS if name in named and is_noise(found.results.values(), name)]


def draw_figures(found: StudyResults) -> dict[str, bytes]:
    """PNG figures of the report, by name."""
    data, metric, baseline, results = found.data, found.metric, found.baseline, found.results
    made = {}
    with_pairs = [c for c in found.comparisons if c.n]
    if with_pairs:
        made["effects"] = figures.png(figures.effects(with_pairs, baseline, metric))
    made["seeds"] = figures.png(figures.seeds(found.values, found.intervals, metric))
    curves = {level: [data.curves.get(t.run_id, []) for t in of.values()] for level, of in results.items()}
    if any(len(run) >= FEWEST_POINTS for runs in curves.values() for run in runs):
        made["curves"] = figures.png(figures.curves(curves, baseline, data.curve, metric.unit))
    noisy = noisy_costs(found)
    costs: dict[str, dict[str, tuple[float, float]]] = {}
    for name in SHOWN_COSTS:
        points = {level: (median_of(results[level], name), found.means[level]) for level in found.means}
        there = {level: (x, y) for level, (x, y) in points.items() if x}
        title = titles(data).get(name)
        if title and title not in noisy and len({x for x, _ in there.values()}) > 1:
            costs[title] = there
    if costs:
        made["tradeoffs"] = figures.png(figures.tradeoffs(costs, metric))
    return made
