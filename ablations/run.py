"""Runs a study or search: validation, study run in MLflow, driver and workers."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from ablations.driver import Driver, RevisedStudy, revise_study
from ablations.dry_run import missing_upstream
from ablations.paths import logs_folder, search_storage, storage_url, trial_storages
from ablations.search import Search
from ablations.search_driver import SearchDriver
from ablations.study import Study, check_name
from ablations.study_run import StudyRun
from ablations.tuning import grid_points
from ablations.worker_pool import visible_gpus
from mmphi.errors import Stopped
from mmphi.tracking.run_writer import TrackingStore
from reports.paired_tests import ALPHA, smallest_p


def summary(plan: RevisedStudy) -> str:
    """One-line summary of a study: numbers of trials and budget of each."""
    study, levels, seeds = plan.study, len(plan.levels), plan.study.seeds
    parts = [f"{levels} levels x {seeds} seeds = {levels * seeds} verdict trials"]
    if study.nuisance:
        tuned = levels * len(grid_points(study.nuisance)) * len(study.tuning_seeds)
        parts.append(f"{tuned} tuning trials before them (more where the best value is the first or last one)")
    if study.tokens:
        parts.append(f"{study.tokens:,} supervised tokens each")
    section = getattr(study.settings(study.baseline), study.stage, None)
    if steps := getattr(section, "alignment_steps", 0):
        parts.append(f"{steps:,} warm-up steps each, which the token budget does not count")
    return ", ".join(parts)


def too_few_seeds(plan: RevisedStudy) -> str:
    """Warning if the study has too few seeds to show any difference, whatever its results; empty otherwise."""
    study, comparisons = plan.study, len(plan.levels) - 1
    units = min(study.replicates or study.seeds, study.seeds)
    least = min(1.0, smallest_p(units) * comparisons)
    if comparisons < 1 or least < ALPHA:
        return ""
    what = "draws" if study.replicates else "seeds"
    return (
        f"warning: with {units} {what} and {comparisons} comparisons the smallest possible p value is {least:.2g}: no"
        f" difference can be shown. {fewest_seeds(comparisons)} {what} are the fewest that can show one."
    )


def _dashboard(url: str) -> str:
    """Hint with the command that opens Optuna's dashboard."""
    install = "" if find_spec("optuna_dashboard") else "pip install optuna-dashboard; "
    return f"Optuna's pages: {install}optuna-dashboard {url}"


def fewest_seeds(comparisons: int) -> int:
    """Smallest number of seeds whose smallest possible p value is below 0.05 after Holm's correction."""
    return next(n for n in range(2, 64) if smallest_p(n) * comparisons < ALPHA)


def run(
    name: str,
    study: Study | Search,
    *,
    workers: int = 0,
    storage: str = "",
    retries: int = 5,
    run_id: str = "",
    command: str = "",
    **worker_options: object,
) -> int:
    """Run or resume a study or search.

    Args:
        name: Name of the study in the store.
        study: Study or search to run.
        workers: Number of worker processes; 0 uses one per GPU, or one without GPUs.
        storage: URL of Optuna's storage; see :func:`ablations.paths.storage_url` for the default.
        retries: How many times a trial is repeated after it crashes or its worker dies.
        run_id: Id of an MLflow run that already exists for the study, such as one of ``mlflow run``; empty creates one.
        command: Command line that started the study, recorded with it.
        **worker_options: Further arguments of :class:`ablations.worker_pool.WorkerPool`.

    Returns:
        Exit code 0.

    Raises:
        SettingsError: If the study is invalid, or the store has a study of this name with another declaration.
        StoreError: If another driver runs the study.
        Stopped: On Ctrl-C; the same command resumes the study.
    """
    check_name(name)
    study.check()
    store = TrackingStore()
    if run_id:
        store.record_in_experiment_of(run_id, f"study {name}")
    record = StudyRun.open(store, name, study.declaration(), run_id, command)
    driver: Driver | SearchDriver
    if isinstance(study, Search):
        driver = SearchDriver(study, record, search_storage(store, name, study, storage), retries=retries)
        what, warning = study.summary(), ""
    else:
        driver = Driver(study, record, trial_storages(store, name, study, storage), retries=retries)
        plan = revise_study(study, record.changes())
        what, warning = summary(plan), too_few_seeds(plan)
    count = workers or max(1, len(visible_gpus()))
    print(f"{study.question}\n{name}: {what}; {count} worker(s)")
    if warning:
        print(warning)
    if isinstance(study, Study) and (shared := missing_upstream(study, store)):
        print(
            f"the first trial also builds missing stages: {', '.join(shared)}. the bar is idle meanwhile;\n"
            f"progress is in {logs_folder(store, name)}"
        )
    print(f"watch it: mmphi studies {name} --watch\n{_dashboard(storage_url(store, storage))}", flush=True)
    try:
        driver.run(count, logs_folder(store, name), **worker_options)
    except KeyboardInterrupt as error:
        record.finish("KILLED")
        raise Stopped(f"stopped; `{command or f'mmphi ablate {name}'}` resumes from there") from error
    except BaseException:
        record.finish("FAILED")
        raise
    record.finish("FINISHED")
    print(f"finished: mmphi report ablation --study {name}", file=sys.stdout, flush=True)
    return 0
