"""Runs one trial: builds a stage with given settings, and tags its MLflow run with the study and the trial."""

from __future__ import annotations

import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.entities import Param
from PIL import Image

from ablations.protocol import TrialRequest, TrialResponse
from mmphi.config.former_names import current_metrics
from mmphi.errors import MmphiError, SettingsError, Stopped, TrainingError
from mmphi.pipeline.build import Pipeline
from mmphi.stages import Settings
from reports.study_query import JUDGED, not_finite

if TYPE_CHECKING:
    from mmphi.pipeline.stage import Result
    from mmphi.tracking.run_tracker import Watch
    from mmphi.tracking.run_writer import TrackingStore

MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "unable to allocate")
FIRST_TOKENS = 5  # Measurements that the median is taken of, after one warm-up.


class Pruned(Exception):  # noqa: N818  # A request of the driver, not an error.
    """The driver pruned a training."""


def run_trial(
    job: TrialRequest, pipeline: Pipeline, report: Callable[[str, float, int], bool] | None = None
) -> TrialResponse:
    """Run a request and return its outcome; exceptions become responses.

    Args:
        job: Request to run.
        pipeline: Pipeline with the models and data that this process has loaded.
        report: Callback that reports a metric's name, value and step to the driver; returns whether to continue.
    """
    begun = time.perf_counter()
    watch = _reporting(job, report) if job.reports and report else None
    try:
        run_id, metrics = _trained(job, pipeline, watch)
    except Pruned as pruned:
        return TrialResponse(job.number, "pruned", reason=str(pruned), seconds=time.perf_counter() - begun)
    except Stopped as stopped:
        return TrialResponse(job.number, "stopped", reason=str(stopped))
    except TrainingError as error:
        return TrialResponse(job.number, "failed", reason=error.what, seconds=time.perf_counter() - begun)
    except MmphiError as error:
        return TrialResponse(job.number, "broken", reason=str(error))
    except Exception as error:
        words = (str(error).splitlines() or [""])[0]
        if isinstance(error, MemoryError) or any(words_of in str(error).lower() for words_of in MEMORY):
            return TrialResponse(
                job.number, "failed", reason=f"out of memory: {words}", seconds=time.perf_counter() - begun
            )
        traceback.print_exc()
        return TrialResponse(job.number, "crashed", reason=f"{type(error).__name__}: {words}")
    return TrialResponse(job.number, "done", metrics, run_id, seconds=time.perf_counter() - begun)


def _reporting(job: TrialRequest, report: Callable[[str, float, int], bool]) -> Watch:
    def watch(values: Mapping[str, float], step: int) -> None:
        if job.reports in values and not report(job.reports, values[job.reports], step):
            raise Pruned(f"{job.reports} = {values[job.reports]:.4g} at step {step}")

    return watch


def _trained(job: TrialRequest, pipeline: Pipeline, watch: Watch | None) -> tuple[str, dict[str, float]]:
    settings = Settings(**job.settings)
    result = pipeline.build(job.stage, settings, title=job.title, tags=job.tags, watch=watch, after=job.after)
    store = pipeline.store
    run = store.run(result.run_id)
    ours = all(run.data.tags.get(name) == value for name, value in job.tags.items())
    run_id = result.run_id if ours else store.copy(run, job.title, job.tags)
    store.client.log_batch(run_id, params=[Param(name, value) for name, value in job.params.items()])
    if job.costs and "cost/first_token_s" not in run.data.metrics:
        _record(store, run_id, {"cost/first_token_s": first_token_s(result, pipeline)})
    data = store.run(run_id).data
    # The values of this build take precedence: the run holds the latest value of each metric over all evaluations of
    # the model.
    metrics = current_metrics(data.metrics) | dict(result.metrics)
    judging = next((after.run_id for after in result.after if job.metric in after.metrics), "")
    if judging:
        store.client.set_tag(run_id, JUDGED, judging)
    if reason := not_finite(store.run(judging).data.tags if judging else data.tags, job.metric):
        raise TrainingError(reason)
    if job.metric not in metrics:
        near = ", ".join(sorted(name for name in metrics if name.startswith(job.metric.partition("/")[0])))
        raise SettingsError(
            f"run {run_id} has no metric {job.metric!r}", f"it has {near or ', '.join(sorted(metrics))}"
        )
    return run_id, metrics


def _record(store: TrackingStore, run_id: str, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        store.client.log_metric(run_id, name, value)


def first_token_s(result: Result, pipeline: Pipeline) -> float:
    """Seconds from an image file and an empty question to the first token of the answer, vision encoder included.

    The median of :data:`FIRST_TOKENS` measurements after one warm-up, with a noise image of 640 x 480 px; 0 if the
    result has no projector.
    """
    from mmphi.models.checkpoint import load_checkpoint

    if not (result.path / "projector.json").exists():
        return 0.0
    model: Any = load_checkpoint(result.path, once=pipeline.resources.once)
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / "photo.jpg"
        Image.effect_noise((640, 480), 64).convert("RGB").save(photo)
        for _ in range(FIRST_TOKENS + 1):
            begun = time.perf_counter()
            model.ask("", str(photo), max_new_tokens=1)
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])
