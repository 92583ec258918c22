"""``mmphi ablate STUDY --dry-run``: every trial of a study and what they would take, without training anything."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from ablations.study import Study
from ablations.trials import TrialSpec
from ablations.tuning import grid_points
from mmphi.config.smoke import is_smoke
from mmphi.describe import duration
from mmphi.errors import SettingsError
from mmphi.pipeline.graph import StageGraph
from mmphi.stages import STAGES
from mmphi.tracking.run_writer import TrackingStore


def planned_trials(study: Study) -> list[TrialSpec]:
    """The trials in the order of their rounds: all tuning trials of the declared values, then the judged ones.

    Which nuisance values the judged ones have is known after tuning; more tuning trials follow where the best value is
    the first or the last one.
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
    """The time of a trial on the machines of this store, and what it is known from; ``None`` where nothing is known.

    Args:
        study: Its stage and its budget.
        store: Where earlier runs are.
        name: Of the study.
    """
    earlier = [
        run.data.metrics["seconds"] for run in store.search("FINISHED", study=name) if "seconds" in run.data.metrics
    ]
    if earlier:
        return median(earlier), f"the median of {len(earlier)} finished trials of this study"
    counted = f"{study.stage}/supervised_tokens"
    for run in store.search("FINISHED", stage=study.stage):
        metrics = run.data.metrics
        if is_smoke(run.data.tags.get("mmphi.preset", "")):
            continue  # Start-up dominates its time.
        if metrics.get("seconds") and metrics.get(counted) and study.tokens:
            own = metrics["seconds"] * study.tokens / metrics[counted]
            return own, f"run {run.info.run_id[:8]} of {study.stage}, in proportion to its supervised tokens"
    return None


def missing_upstream(study: Study, store: TrackingStore) -> list[str]:
    """Stages that the first trial has to build before it trains; empty where a file that they read is missing."""
    settings = study.settings(study.baseline)
    try:
        return StageGraph(STAGES, store).missing(study.stage, settings)[:-1]
    except SettingsError:
        return []  # The trial itself explains it.


def lines(name: str, study: Study, store: TrackingStore, workers: int) -> Sequence[str]:
    """What would be trained, a line each.

    Args:
        name: Of the study in the store.
        study: What it is.
        store: Where earlier runs are.
        workers: Processes that would train.
    """
    trials = planned_trials(study)
    width = max(len(trial.level) for trial in trials)
    rows = [
        f"  {number:>4}  {trial.phase:<7}  {trial.level:<{width}}  seed {trial.number}"
        + "".join(f"  {key} = {value}" for key, value in trial.nuisance.items())
        for number, trial in enumerate(trials, 1)
    ]
    tuning = sum(trial.phase == "tuning" for trial in trials)
    text = f"{len(trials)} trials: {tuning} of tuning and {len(trials) - tuning} that are judged"
    if upstream := missing_upstream(study, store):
        text += f"\nbuilt before them, because no run has them yet: {', '.join(upstream)}"
    known = seconds_per_trial(study, store, name)
    if known is None:
        return [*rows, text, f"time: unknown, because this store has no finished run of {study.stage}"]
    each, source = known
    whole = duration(each * len(trials) / workers)
    return [*rows, text, f"time: about {whole} with {workers} worker(s), {duration(each)} a trial ({source})"]


def without_tuning(study: Study) -> Study:
    """The same study, with every level judged at the values of the preset.

    Raises:
        SettingsError: If it has no nuisance settings.
    """
    from dataclasses import replace

    if not study.nuisance:
        raise SettingsError("this study has no nuisance settings", "leave --no-tuning out")
    return replace(study, nuisance={})
