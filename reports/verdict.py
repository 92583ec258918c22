"""What a study says, in words, with its uncertainty."""

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
    """What is judged.

    Attributes:
        name: As runs name it.
        unit: Of it.
        less: Whether less of it is better.
        margin: The smallest difference that would matter; 0 for none.
    """

    name: str
    unit: str
    less: bool
    margin: float = 0.0

    def better(self, difference: float) -> bool:
        """Whether a difference to the baseline is an improvement."""
        return (difference < 0) == self.less


def number(value: float, digits: int = 3) -> str:
    """A number as a person would write it, with a minus sign that is one."""
    if not np.isfinite(value):
        return "-"
    text = f"{value:.{digits}g}" if abs(value) < 1 else f"{value:.{digits + 1}g}"
    if abs(value) >= 1000:
        text = f"{value:,.0f}"
    elif "e" in text:
        text = f"{value:.1e}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def ends_of(interval: Interval | None, sign: float = 1.0) -> str:
    """An interval as a cell of a table."""
    if interval is None:
        return "-"
    low, high = sorted((sign * interval.low, sign * interval.high))
    return f"{number(low)} to {number(high)}"


def range_of(interval: Interval | None, sign: float = 1.0) -> str:
    """An interval in words."""
    return f"95 % interval {ends_of(interval, sign)}" if interval else "no interval: one seed"


def p_value(p: float) -> str:
    """A p value, with as many digits as it deserves."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def after_holm(comparison: Comparison) -> str:
    """What a p value was corrected for."""
    many = comparison.comparisons
    looks = f" for looks at {listed([str(look) for look in comparison.looks])} seeds" if comparison.looks else ""
    holm = f" after Holm over {many} comparisons" if many > 1 else ""
    return f"{holm}{' and' if holm and looks else ''}{' corrected' if looks else ''}{looks}"


def left_out(comparison: Comparison, baseline: str) -> str:
    """How many runs are not among the pairs; empty where there are none."""
    own, other = comparison.lost
    if not own and not other:
        return ""
    return (
        f" Left out, because they diverged or gave no number: {own} runs of {quoted(comparison.level)} and {other} of"
        f" {baseline} (exact McNemar test, {p_value(comparison.p_lost)})."
    )


def sentence(comparison: Comparison, baseline: str, metric: JudgedMetric) -> str:
    """The verdict on one level.

    Args:
        comparison: Of the level with the baseline.
        baseline: Its name.
        metric: What was measured.
    """
    level, n, baseline = quoted(comparison.level), comparison.n, quoted(baseline)
    if n == 0:
        pairs = "no pair of runs gave a number" if any(comparison.lost) else f"it has no seed in common with {baseline}"
        return f"Nothing can be said of {level}: {pairs}.{left_out(comparison, baseline)}"
    return _verdict(comparison, baseline, metric) + left_out(comparison, baseline)


def _verdict(comparison: Comparison, baseline: str, metric: JudgedMetric) -> str:
    level, n = quoted(comparison.level), comparison.n
    size = f"{number(abs(comparison.difference))} {metric.unit}"
    seeds = f"{n} {comparison.unit}s" if n > 1 else f"1 {comparison.unit}"
    if comparison.interim:
        first = f" before {comparison.looks[0]} seeds" if comparison.looks else ""
        return (
            f"**No verdict on {level} yet**{first}: so far {number(comparison.difference)} {metric.unit} from"
            f" {baseline} ({range_of(comparison.interval)}, {seeds})."
        )
    if comparison.verdict == "different":
        better = metric.better(comparison.difference)
        what = "beat" if better else "did worse than"  # In the past all numbers agree.
        sign = 1.0 if comparison.difference > 0 else -1.0
        small = f"; yet shown to lie within {number(metric.margin)}, too little to matter" if comparison.small else ""
        return (
            f"**{level} {what} {baseline} by {size}** ({range_of(comparison.interval, sign)},"
            f" {p_value(comparison.p)}{after_holm(comparison)}, {seeds}{small})."
        )
    seen = f"{number(comparison.difference)} {metric.unit}, {range_of(comparison.interval)}"
    if comparison.verdict == "equivalent":
        return (
            f"**{level} equalled {baseline} within {number(metric.margin)} {metric.unit}** (difference {seen};"
            f" two one-sided tests, {p_value(comparison.p_equivalence)}{after_holm(comparison)}, {seeds})."
        )
    why = _why_not(comparison, metric)
    return f"**No difference can be shown between {level} and {baseline}** with {seeds} ({seen},{why})."


def _why_not(comparison: Comparison, metric: JudgedMetric) -> str:
    """What kept a comparison from a verdict, and how many seeds would not be kept."""
    least = min(1.0, smallest_p(comparison.n) * comparison.comparisons)
    parts = [f" {p_value(comparison.p)}{after_holm(comparison)}"]
    if least >= ALPHA:
        parts = [f" the smallest p possible with {comparison.n} is {number(least, 2)}{after_holm(comparison)}"]
    wanted = metric.margin or abs(comparison.difference)
    if comparison.n > 1 and wanted:
        needed = seeds_needed(wanted, comparison.deviation, ALPHA / comparison.comparisons)
        what = f"{number(wanted)} {metric.unit}{'' if metric.margin else ', the difference seen,'}"
        number_of = f"{needed:,} {comparison.unit}s" if needed else f"no number of {comparison.unit}s below 10,000"
        parts.append(f" at the noise seen, {number_of} would show {what} with power {POWER}")
    return ";".join(parts)


def headline(comparisons: Sequence[Comparison], baseline: str, metric: JudgedMetric) -> str:
    """The whole study in a sentence or two.

    Args:
        comparisons: Of every level with the baseline.
        baseline: Its name.
        metric: What was measured.
    """
    if comparisons and all(c.interim for c in comparisons):
        return "**No verdict yet: the study has not come to the number of seeds at which it is judged.**"
    better = [c for c in comparisons if c.verdict == "different" and metric.better(c.difference)]
    worse = [c for c in comparisons if c.verdict == "different" and not metric.better(c.difference)]
    same = [quoted(c.level) for c in comparisons if c.verdict == "equivalent"]
    unsaid = [quoted(c.level) for c in comparisons if c.verdict == "open"]
    waiting = [quoted(c.level) for c in comparisons if c.verdict == "interim"]
    parts = []
    if better:
        # By the differences at the seeds of the baseline: means of levels with other seeds do not compare.
        best = min(better, key=lambda c: c.difference if metric.less else -c.difference)
        parts.append(sentence(best, baseline, metric))
        others = [quoted(c.level) for c in better if c is not best]
        if others:
            parts.append(f"{listed(others)} also beat it.")
    else:
        parts.append(f"**No level is shown to be better than {quoted(baseline)}.**")
        if len(comparisons) == 1:
            return sentence(comparisons[0], baseline, metric)
    if worse:
        parts.append(f"{listed([quoted(c.level) for c in worse])} did worse.")
    if same:
        parts.append(f"{listed(same)} equalled it within {number(metric.margin)} {metric.unit}.")
    if unsaid:
        parts.append(f"Of {listed(unsaid)} no difference can be shown.")
    if empty := [quoted(c.level) for c in comparisons if c.verdict == "none"]:
        parts.append(f"{listed(empty)} {'has' if len(empty) == 1 else 'have'} no result to compare.")
    if waiting:
        parts.append(f"{listed(waiting)} have too few seeds for a verdict yet.")
    return " ".join(parts)


def quoted(name: str) -> str:
    """A name of a level in a sentence: in quotes where it is longer than two words, as *better than none* is."""
    return f"“{name}”" if len(re.findall(r"[^\W_]+", name)) > 2 and "`" not in name and ", " not in name else name


def listed(names: Sequence[str]) -> str:
    """Names as prose lists them; in quotes where one has a comma of its own."""
    if len(names) > 1 and any(", " in name for name in names):
        names = [f"“{name}”" for name in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
