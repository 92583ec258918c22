"""``mmphi ablate STUDY --dry-run``: lists the trials of a study and estimates their time, without training."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from ablations.study import Study
from ablations.trials import TrialSpec
from ablations.tuning import grid_points
from mmphi.describe import duration
from mmphi.errors import SettingsError
from mmphi.pipeline.graph import StageGraph
from mmphi.stages import STAGES
from mmphi.tracking.run_writer import TrackingStore


def planned_trials(study: Study) -> list[TrialSpec]:
    """Trials in the order in which they run: the tuning trials of the declared values, then the verdict trials.

    The nuisance values of verdict trials are empty, because tuning chooses them. If the best value is the first or the
    last one, a study runs more tuning trials than these.
    """
    points = grid_points(study.nuisance) if study.nuisance else []
    tuning = [
        TrialSpec("tuning", level, number, point)
        for number in study.tuning_seeds
        for level in study.levels
        for point in points
    ]
    return tuning + [TrialSpec("verdict", level, number) for number in range(study.seeds) for level in study.levels]


def seconds_per_trial(study: Study, store: TrackingStore, name: str) -> tuple[float, str] | None:
    """Estimate the seconds of a trial from earlier runs of its preset, and name the source; ``None`` without one.

    Args:
        study: Study whose stage and token budget are used.
        store: Tracking store with earlier runs.
        name: Name of the study.
    """
    earlier = [
        run.data.metrics["seconds"] for run in store.search("FINISHED", study=name) if "seconds" in run.data.metrics
    ]
    if earlier:
        return median(earlier), f"the median of {len(earlier)} finished trials of this study"
    counted = f"{study.stage}/supervised_tokens"
    for run in store.search("FINISHED", stage=study.stage, preset=study.settings(study.baseline).name):
        metrics = run.data.metrics
        if metrics.get("seconds") and metrics.get(counted) and study.tokens:
            own = metrics["seconds"] * study.tokens / metrics[counted]
            return own, f"run {run.info.run_id[:8]} of {study.stage}, in proportion to its supervised tokens"
    return None


def missing_upstream(study: Study, store: TrackingStore) -> list[str]:
    """Upstream stages without a result, which the first trial builds; empty if an input file is missing."""
    settings = study.settings(study.baseline)
    try:
        return StageGraph(STAGES, store).missing(study.stage, settings)[:-1]
    except SettingsError:
        return []  # The first trial raises the same error with its explanation.


def lines(name: str, study: Study, store: TrackingStore, workers: int) -> Sequence[str]:
    """Lines that list the planned trials, their number and the estimated time.

    Args:
        name: Name of the study in the store.
        study: Study to plan.
        store: Tracking store with earlier runs.
        workers: Number of worker processes.
    """
    trials = planned_trials(study)
    width = max(len(trial.level) for trial in trials)
    rows = [
        f"  {number:>4}  {trial.phase:<7}  {trial.level:<{width}}  seed {trial.number}"
        + "".join(f"  {key} = {value}" for key, value in trial.nuisance.items())
        for number, trial in enumerate(trials, 1)
    ]
    tuning = sum(trial.phase == "tuning" for trial in trials)
    text = f"{len(trials)} trials: {tuning} tuning and {len(trials) - tuning} verdict trials"
    if upstream := missing_upstream(study, store):
        text += f"\nupstream stages without a result, built first: {', '.join(upstream)}"
    known = seconds_per_trial(study, store, name)
    if known is None:
        return [*rows, text, f"time: unknown, because this store has no finished run of {study.stage} with this preset"]
    each, source = known
    whole = duration(each * len(trials) / workers)
    return [*rows, text, f"time: about {whole} with {workers} worker(s), {duration(each)} a trial ({source})"]


def without_tuning(study: Study) -> Study:
    """Copy of a study without tuning: every level uses the preset's nuisance values.

    Raises:
        SettingsError: If the study has no nuisance settings.
    """
    from dataclasses import replace

    if not study.nuisance:
        raise SettingsError("this study has no nuisance settings", "leave --no-tuning out")
    return replace(study, nuisance={})
