"""Locations of a study's trial storages and worker logs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ablations.finished_trials import FinishedTrials
from mmphi.tracking.uri import SQLITE, database

if TYPE_CHECKING:
    from ablations.search import Search
    from ablations.study import Study
    from ablations.trial_storage import TrialStorage
    from mmphi.tracking.run_store import RunStore


def storage_url(store: RunStore, given: str = "") -> str:
    """URL of Optuna's storage: ``given``, else ``MMPHI_OPTUNA``, else a SQLite file next to MLflow's database."""
    named = given or os.environ.get("MMPHI_OPTUNA", "")
    if named:
        return named
    file = database(store.uri)
    return f"{SQLITE}{(file.parent if file else store.cache) / 'optuna.db'}"


def logs_folder(store: RunStore, name: str) -> Path:
    """Folder of the worker logs of a study."""
    return store.locks.parent / ".logs" / name.replace("/", "_")


def trial_storages(store: RunStore, name: str, study: Study, storage: str) -> dict[str, TrialStorage]:
    """Trial storages of a study by phase: ``verdict`` and ``tuning``."""
    from ablations.trial_storage import TrialStorage

    url, results, record = storage_url(store, storage), FinishedTrials(store, name), _record(store, name)
    return {
        "verdict": TrialStorage(url, name, [study.direction], record=record, results=results),
        "tuning": TrialStorage(url, f"{name}/tuning", ["minimize"], record=record, results=results),
    }


def _record(store: RunStore, name: str) -> str:
    """Id of the study run in MLflow; empty if the study does not exist."""
    found = next(store.search(study_record=name), None)
    return str(found.info.run_id) if found is not None else ""


def search_storage(store: RunStore, name: str, search: Search, storage: str) -> TrialStorage:
    """Trial storage of a search."""
    from ablations.trial_storage import TrialStorage

    url = storage_url(store, storage)
    directions, record = list(search.objectives.values()), _record(store, name)
    # Without ``results``: the sampler has used each result, so trials whose runs were deleted are not repeated.
    return TrialStorage(url, name, directions, search.made_sampler(), search.made_pruner(), record=record)
