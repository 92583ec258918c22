"""Results of a study: values, means, intervals and comparisons, computed once for text, tables and figures."""

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
    """Results of a study.

    Attributes:
        data: The study.
        metric: The judged metric.
        baseline: Level that the others are compared with.
        results: Finished verdict trials, by level and seed.
        values: Value of the metric of all of them, by level and seed.
        lost: Seeds whose run diverged or has no value, by level.
        judged: Value of the metric by level and seed, without seeds beyond the look and without diverged runs.
        means: Mean of ``judged`` by level; only levels with values.
        intervals: Interval of the mean, by level.
        comparisons: Comparison of every other level with the baseline.
        exploratory: Comparisons over all seeds, if there are more than the study declared; not used for verdicts.
    """

    data: StudyData
    metric: JudgedMetric
    baseline: str
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
        """Compute the results of a study.

        Raises:
            StoreError: If no trial has the judged metric; the message lists the metrics that exist.
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
    """How a study is judged, and over which of its current seeds."""
    baseline = str(data.declaration["baseline"])
    ended = {level: data.ended(level) for level in data.levels}
    until = {level: looks_reached(min(ended[level], ended.get(baseline, 0)), data.looks) for level in data.levels}
    return Judging(metric.margin, metric.less, data.looks, until, data.draw(), data.lost(), _without_results(data))


def _without_results(data: StudyData) -> set[str]:
    """Levels that cannot get a result: they have none, and are stopped or lost the run of every seed."""
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
