"""Verdicts of a study as sentences, with their uncertainty."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reports.comparison import Comparison
from reports.paired_tests import ALPHA, Interval, smallest_p
from reports.power import POWER, seeds_needed


@dataclass(frozen=True)
class JudgedMetric:
    """The metric that a study judges.

    Attributes:
        name: Name of the metric in MLflow.
        unit: Unit of the metric.
        less: Whether lower values are better.
        margin: Smallest difference of practical relevance, in ``unit``; 0 for none.
    """

    name: str
    unit: str
    less: bool
    margin: float = 0.0

    def better(self, difference: float) -> bool:
        """Whether a difference (level minus baseline) is an improvement."""
        return (difference < 0) == self.less


def format_number(value: float, digits: int = 3) -> str:
    """Format a number with a typographic minus sign; ``-`` if it is not finite.

    Args:
        value: The number.
        digits: Significant digits below 1; one more from 1, and whole numbers with thousands separators from 1,000.
    """
    if not np.isfinite(value):
        return "-"
    text = f"{value:.{digits}g}" if abs(value) < 1 else f"{value:.{digits + 1}g}"
    if abs(value) >= 1000:
        text = f"{value:,.0f}"
    elif "e" in text:
        text = f"{value:.1e}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def format_interval(interval: Interval | None, sign: float = 1.0) -> str:
    """Format an interval as a table cell, after multiplication of its ends by ``sign``."""
    if interval is None:
        return "-"
    low, high = sorted((sign * interval.low, sign * interval.high))
    return f"{format_number(low)} to {format_number(high)}"


def interval_text(interval: Interval | None, sign: float = 1.0) -> str:
    """Format an interval for a sentence, after multiplication of its ends by ``sign``."""
    return f"95 % interval {format_interval(interval, sign)}" if interval else "no interval: one seed"


def format_p(p: float) -> str:
    """Format a p value: three decimals below 0.1, else two; ``p < 0.001`` below that."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def holm_note(comparison: Comparison) -> str:
    """Text that names the corrections of a p value: Holm's method and interim looks."""
    many = comparison.comparisons
    looks = f" for looks at {join_names([str(look) for look in comparison.looks])} seeds" if comparison.looks else ""
    holm = f" after Holm over {many} comparisons" if many > 1 else ""
    return f"{holm}{' and' if holm and looks else ''}{' corrected' if looks else ''}{looks}"


def excluded_note(comparison: Comparison, baseline: str) -> str:
    """Sentence about the runs excluded from the pairs; empty if there are none."""
    own, other = comparison.lost
    if not own and not other:
        return ""
    return (
        f" Left out, because they diverged or gave no number: {own} runs of {quote_name(comparison.level)} and"
        f" {other} of {baseline} (exact McNemar test, {format_p(comparison.p_lost)})."
    )


def format_verdict(comparison: Comparison, baseline: str, metric: JudgedMetric) -> str:
    """The verdict on one level, as a sentence.

    Args:
        comparison: Comparison of the level with the baseline.
        baseline: Name of the baseline.
        metric: The judged metric.
    """
    level, n, baseline = quote_name(comparison.level), comparison.n, quote_name(baseline)
    if n == 0:
        pairs = "no pair of runs gave a number" if any(comparison.lost) else f"it has no seed in common with {baseline}"
        return f"No statement is possible about {level}: {pairs}.{excluded_note(comparison, baseline)}"
    return _verdict(comparison, baseline, metric) + excluded_note(comparison, baseline)


def _verdict(comparison: Comparison, baseline: str, metric: JudgedMetric) -> str:
    level, n = quote_name(comparison.level), comparison.n
    size = f"{format_number(abs(comparison.difference))} {metric.unit}"
    seeds = f"{n} {comparison.unit}s" if n > 1 else f"1 {comparison.unit}"
    if comparison.interim:
        first = f" before {comparison.looks[0]} seeds" if comparison.looks else ""
        return (
            f"**No verdict on {level} yet**{first}: so far {format_number(comparison.difference)} {metric.unit} from"
            f" {baseline} ({interval_text(comparison.interval)}, {seeds})."
        )
    if comparison.verdict == "different":
        better = metric.better(comparison.difference)
        what = "beat" if better else "did worse than"  # The past tense fits singular and plural names.
        sign = 1.0 if comparison.difference > 0 else -1.0
        small = (
            f"; yet shown to lie within {format_number(metric.margin)}, too little to matter"
            if comparison.small
            else ""
        )
        return (
            f"**{level} {what} {baseline} by {size}** ({interval_text(comparison.interval, sign)},"
            f" {format_p(comparison.p)}{holm_note(comparison)}, {seeds}{small})."
        )
    seen = f"{format_number(comparison.difference)} {metric.unit}, {interval_text(comparison.interval)}"
    if comparison.verdict == "equivalent":
        return (
            f"**{level} equalled {baseline} within {format_number(metric.margin)} {metric.unit}** (difference {seen};"
            f" two one-sided tests, {format_p(comparison.p_equivalence)}{holm_note(comparison)}, {seeds})."
        )
    why = _why_not(comparison, metric)
    return f"**No difference can be shown between {level} and {baseline}** with {seeds} ({seen},{why})."


def _why_not(comparison: Comparison, metric: JudgedMetric) -> str:
    """Why a comparison shows no difference, and how many seeds would show one."""
    least = min(1.0, smallest_p(comparison.n) * comparison.comparisons)
    parts = [f" {format_p(comparison.p)}{holm_note(comparison)}"]
    if least >= ALPHA:
        parts = [f" the smallest p possible with {comparison.n} is {format_number(least, 2)}{holm_note(comparison)}"]
    wanted = metric.margin or abs(comparison.difference)
    if comparison.n > 1 and wanted:
        needed = seeds_needed(wanted, comparison.deviation, ALPHA / comparison.comparisons)
        what = f"{format_number(wanted)} {metric.unit}{'' if metric.margin else ', the difference seen,'}"
        number_of = f"{needed:,} {comparison.unit}s" if needed else f"no number of {comparison.unit}s below 10,000"
        parts.append(f" at the noise seen, {number_of} would show {what} with power {POWER}")
    return ";".join(parts)


def headline(comparisons: Sequence[Comparison], baseline: str, metric: JudgedMetric) -> str:
    """Summary of the study in a few sentences.

    Args:
        comparisons: Comparisons of all other levels with the baseline.
        baseline: Name of the baseline.
        metric: The judged metric.
    """
    if comparisons and all(c.interim for c in comparisons):
        return "**No verdict yet: the study has not reached the number of seeds at which it is judged.**"
    better = [c for c in comparisons if c.verdict == "different" and metric.better(c.difference)]
    worse = [c for c in comparisons if c.verdict == "different" and not metric.better(c.difference)]
    same = [quote_name(c.level) for c in comparisons if c.verdict == "equivalent"]
    undecided = [quote_name(c.level) for c in comparisons if c.verdict == "open"]
    waiting = [quote_name(c.level) for c in comparisons if c.verdict == "interim"]
    parts = []
    if better:
        # By differences, which are paired with the baseline; means of levels with different seeds are not comparable.
        best = min(better, key=lambda c: c.difference if metric.less else -c.difference)
        parts.append(format_verdict(best, baseline, metric))
        others = [quote_name(c.level) for c in better if c is not best]
        if others:
            parts.append(f"{join_names(others)} also beat it.")
    else:
        parts.append(f"**No level is shown to be better than {quote_name(baseline)}.**")
        if len(comparisons) == 1:
            return format_verdict(comparisons[0], baseline, metric)
    if worse:
        parts.append(f"{join_names([quote_name(c.level) for c in worse])} did worse.")
    if same:
        parts.append(f"{join_names(same)} equalled it within {format_number(metric.margin)} {metric.unit}.")
    if undecided:
        parts.append(f"Of {join_names(undecided)} no difference can be shown.")
    if empty := [quote_name(c.level) for c in comparisons if c.verdict == "none"]:
        parts.append(f"{join_names(empty)} {'has' if len(empty) == 1 else 'have'} no result to compare.")
    if waiting:
        parts.append(f"{join_names(waiting)} have too few seeds for a verdict yet.")
    return " ".join(parts)


def quote_name(name: str) -> str:
    """Name of a level for use in a sentence, in quotes if it has more than two words, such as *better than none*."""
    return f"“{name}”" if len(re.findall(r"[^\W_]+", name)) > 2 and "`" not in name and ", " not in name else name


def join_names(names: Sequence[str]) -> str:
    """Join names as an enumeration with "and"; in quotes if one of them contains a comma."""
    if len(names) > 1 and any(", " in name for name in names):
        names = [f"“{name}”" for name in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
