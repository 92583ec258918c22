"""Detects results of a study that are no longer in MLflow's store, because a run was deleted after its trial ended."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from reports.study_query import JUDGED

if TYPE_CHECKING:
    from mmphi.tracking.run_store import RunStore

AGAIN_S = 60.0  # Time after which the store is queried again, because runs may be deleted while a study runs.


class FinishedTrials:
    """Existing and deleted runs of a study.

    Args:
        store: Tracking store.
        name: Name of the study.
    """

    def __init__(self, store: RunStore, name: str) -> None:
        self.store, self.name = store, name
        self._there: set[str] = set()
        self._gone: set[str] = set()
        self._at = float("-inf")

    def gone(self, run_ids: Iterable[str]) -> set[str]:
        """Ids among ``run_ids`` whose run, or the evaluation that judged it, was deleted."""
        ids = {run_id for run_id in run_ids if run_id}
        if not ids <= self._there | self._gone or time.monotonic() - self._at > AGAIN_S:
            self._there = set(self._found())
            self._gone = (self._gone | ids) - self._there
            self._at = time.monotonic()
        return ids & self._gone

    def _found(self) -> Iterable[str]:
        for run in self.store.search(study=self.name):
            evaluation = run.data.tags.get(JUDGED)
            if not evaluation or self._active(evaluation):
                yield str(run.info.run_id)

    def _active(self, run_id: str) -> bool:
        run = self.store.run_if_there(run_id)
        return run is not None and bool(run.info.lifecycle_stage == "active")
