"""Stores a shared view state, as MLflow's *Share* button does: which metrics the run list and charts show first.

MLflow 3 keeps the columns and charts of a page in the browser and orders charts by name, so that warm-up and memory
come before losses. A page opened with ``viewStateShareKey=KEY`` loads its state from the experiment's tag
``mlflow.sharedViewState.KEY`` instead.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

TAG = "mlflow.sharedViewState."
KEY = "mmphi"
RESULTS = "Results"
# Losses first, then metrics of the test split; those that an experiment lacks are omitted.
HEADLINES = (
    *("val/loss", "train/loss", "test/loss", "test/exact_match", "test/cider", "test/grounding_gain"),
    *("test/yes_no_accuracy", "test/yes_no_accuracy_held_out_phrasing", "test/wer", "public/loss"),
)
SECTIONS = ("val", "test", "train")  # Order of the first chart sections.
MOST = 10  # Maximum number of charts: MLflow limits a tag to 5,000 characters.
RUNS_READ = 200  # Number of newest runs from which metric names are collected.


def _chart(metric: str, section: str, curve: bool) -> dict[str, Any]:
    chart: dict[str, Any] = {
        "uuid": metric,
        "type": "LINE" if curve else "BAR",
        "metricKey": metric,
        "metricSectionId": section,
        "isGenerated": False,
        "deleted": False,
        "displayName": metric,
        "runsCountToCompare": 10,
    }
    if curve:
        chart |= {"lineSmoothness": 0, "scaleType": "linear", "xAxisScaleType": "linear", "xAxisKey": "step"}
        chart |= {"range": {}, "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True, "selectedXAxisMetricKey": ""}
    return chart


def view_state(metrics: Sequence[str], curves: Sequence[str]) -> dict[str, Any]:
    """Returns the state of a page whose run list and first charts show the given metrics.

    Args:
        metrics: Names of the metrics, in display order.
        curves: Those metrics that are recorded at several steps.
    """
    columns = [f"metrics.`{name}`" for name in metrics]
    sections = [RESULTS, *SECTIONS]
    return {
        "selectedColumns": columns,
        "columnOrder": [],
        "columnWidths": {},
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        "runsHiddenMode": "FIRST_10_RUNS",
        "compareRunCharts": [_chart(name, RESULTS, name in curves) for name in metrics],
        "compareRunSections": [{"uuid": name, "name": name, "display": True, "isReordered": True} for name in sections],
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def share(client: MlflowClient, experiment: str, first: Sequence[str] = (), key: str = KEY) -> str:
    """Store the view state of an experiment; returns the query parameter that loads it.

    Args:
        client: MLflow client of the store.
        experiment: ID of the experiment.
        first: Metrics to show before :data:`HEADLINES`, such as that of a study.
        key: Name of the state; an existing state of this name is replaced.
    """
    runs = client.search_runs([experiment], max_results=RUNS_READ, order_by=["attributes.start_time DESC"])
    recorded = {name for run in runs for name in run.data.metrics}
    shown = [name for name in dict.fromkeys([*first, *HEADLINES]) if name in recorded][:MOST]
    curves = [name for name in shown if any(_is_curve(client, run.info.run_id, name) for run in _with(runs, name))]
    client.set_experiment_tag(experiment, f"{TAG}{key}", json.dumps(view_state(shown, curves), separators=(",", ":")))
    return f"viewStateShareKey={key}"


def _with(runs: Sequence[Any], metric: str) -> Sequence[Any]:
    return [run for run in runs if metric in run.data.metrics][:3]


def _is_curve(client: MlflowClient, run_id: str, metric: str) -> bool:
    return len({point.step for point in client.get_metric_history(run_id, metric)}) > 1
