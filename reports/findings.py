"""What the trials of a study come to: values, means, intervals, comparisons; worked out once for words and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmphi.errors import StoreError
from reports.query import StudyData, Trial
from reports.statistics import Comparison, Interval, compare, interval
from reports.verdict import Metric


@dataclass(frozen=True)
class Findings:
    """What a study found.

    Attributes:
        data: The study.
        metric: What was judged.
        baseline: The level that the others are compared with.
        results: Its judged trials, by level and seed.
        values: The metric, by level and seed.
        means: By level; of levels that have any.
        intervals: Of the means, by level.
        comparisons: Of every other level with the baseline.
    """

    data: StudyData
    metric: Metric
    baseline: str
    results: Mapping[str, Mapping[int, Trial]]
    values: Mapping[str, Mapping[int, float]]
    means: Mapping[str, float]
    intervals: Mapping[str, Interval | None]
    comparisons: Sequence[Comparison]

    @classmethod
    def of(cls, data: StudyData) -> Findings:
        """Work them out.

        Raises:
            StoreError: If no trial has what is judged; says what the trials do have.
        """
        declared = data.declaration
        metric = Metric(declared["metric"], declared["unit"], declared["direction"] == "minimize", declared["margin"])
        values, baseline = data.values(metric.name), str(declared["baseline"])
        _some(data, metric, values)
        return cls(
            data,
            metric,
            baseline,
            data.results("verdict", metric.name),
            values,
            {level: float(np.mean(list(of.values()))) for level, of in values.items() if of},
            {level: interval(list(of.values())) for level, of in values.items()},
            compare({level: values[level] for level in data.levels}, baseline, metric.margin),
        )


def _some(data: StudyData, metric: Metric, values: Mapping[str, Mapping[int, float]]) -> None:
    if any(values.values()):
        return
    finished = [t for t in data.trials if t.phase == "verdict" and t.finished]
    if not finished:
        raise StoreError(f"no trial of the study {data.name} is finished", f"mmphi ablate {data.name} goes on with it")
    there = sorted({name for t in finished for name in t.metrics if "/" in name})
    raise StoreError(f"no run of the study {data.name} has the metric {metric.name}", f"they have {', '.join(there)}")
