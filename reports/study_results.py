"""What the trials of a study come to: values, means, intervals, comparisons; worked out once for words and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmphi.errors import StoreError
from reports.comparison import Comparison, Judging, compare, lost_runs
from reports.interim_looks import looks_reached
from reports.paired_tests import Interval, interval
from reports.study_query import StudyData, Trial
from reports.verdict import JudgedMetric


@dataclass(frozen=True)
class StudyResults:
    """What a study found.

    Attributes:
        data: The study.
        metric: What was judged.
        baseline: The level that the others are compared with.
        judging: How it is judged, and over which seeds.
        results: Its trials, by level and seed.
        values: The metric of all of them, by level and seed.
        lost: Seeds whose run diverged or gave no number, by level.
        judged: The metric of those that are judged: without seeds beyond the look, and without runs that diverged.
        means: Of these by level; of levels that have any.
        intervals: Of the means, by level.
        comparisons: Of every other level with the baseline.
        exploratory: The same over all seeds, where there are more than the study declared; never a verdict.
    """

    data: StudyData
    metric: JudgedMetric
    baseline: str
    judging: Judging
    results: Mapping[str, Mapping[int, Trial]]
    values: Mapping[str, Mapping[int, float]]
    lost: Mapping[str, set[int]]
    judged: Mapping[str, Mapping[int, float]]
    means: Mapping[str, float]
    intervals: Mapping[str, Interval | None]
    comparisons: Sequence[Comparison]
    exploratory: Sequence[Comparison] = ()

    @classmethod
    def of(cls, data: StudyData) -> StudyResults:
        """Work them out.

        Raises:
            StoreError: If no trial has what is judged; says what the trials do have.
        """
        declared = data.declaration
        metric = JudgedMetric(
            declared["metric"], declared["unit"], declared["direction"] == "minimize", declared["margin"]
        )
        values, baseline = data.values(metric.name), str(declared["baseline"])
        _some(data, metric, values)
        levels = {level: values[level] for level in data.levels}
        judging = judging_of(data, metric)
        lost = lost_runs(levels, judging)
        ends = dict(judging.until or {})
        judged = {
            level: {n: v for n, v in of.items() if n not in lost[level] and _within(n, ends.get(level))}
            for level, of in levels.items()
        }
        beyond = any(n >= data.planned for of in levels.values() for n in of)
        return cls(
            data,
            metric,
            baseline,
            judging,
            data.results("verdict", metric.name),
            values,
            lost,
            judged,
            {level: float(np.mean(list(of.values()))) for level, of in judged.items() if of},
            {level: interval(list(of.values())) for level, of in judged.items()},
            compare(levels, baseline, judging=judging),
            compare(levels, baseline, judging=replace(judging, until=None)) if beyond else (),
        )


def judging_of(data: StudyData, metric: JudgedMetric) -> Judging:
    """How a study is judged, and over which of the seeds that it has by now."""
    baseline = str(data.declaration["baseline"])
    ended = {level: data.ended(level) for level in data.levels}
    until = {level: looks_reached(min(ended[level], ended.get(baseline, 0)), data.looks) for level in data.levels}
    return Judging(metric.margin, metric.less, data.looks, until, data.draw(), data.lost(), _without_results(data))


def _without_results(data: StudyData) -> set[str]:
    """Levels that have no result and get none any more: stopped, or with a run without a number for every seed."""
    values, lost = data.results("verdict", data.declaration["metric"]), data.lost()
    none = {level for level in data.levels if not values[level]}
    return {level for level in none if level in data.stopped or len(lost[level]) >= data.seeds}


def _within(number: int, end: int | None) -> bool:
    return end is None or number < end


def _some(data: StudyData, metric: JudgedMetric, values: Mapping[str, Mapping[int, float]]) -> None:
    if any(values.values()):
        return
    finished = [t for t in data.trials if t.phase == "verdict" and t.finished]
    if not finished:
        raise StoreError(
            f"no trial of the study {data.name} is finished", f"mmphi ablate {data.name} continues with it"
        )
    there = sorted({name for t in finished for name in t.metrics if "/" in name and not name.startswith("system/")})
    raise StoreError(f"no run of the study {data.name} has the metric {metric.name}", f"they have {', '.join(there)}")
