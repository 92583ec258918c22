"""A study from its declaration to its last trial."""

from __future__ import annotations

import sys

from ablations.crew import visible_gpus
from ablations.driver import Driver, changed
from ablations.places import ledgers, logs_folder, search_ledger, storage_url
from ablations.record import Record
from ablations.search import Search
from ablations.search_driver import SearchDriver
from ablations.study import Study, check_name
from mmphi.errors import Stopped
from mmphi.tracking.store import Store


def run(
    name: str,
    study: Study | Search,
    *,
    workers: int = 0,
    storage: str = "",
    retries: int = 5,
    run_id: str = "",
    command: str = "",
    **crew: object,
) -> int:
    """Run a study, or go on with it.

    Args:
        name: What it is called in the store.
        study: What it is.
        workers: Processes that train; 0 takes one a GPU, else one.
        storage: Optuna's.
        retries: How often a worker may die over a cell.
        run_id: A run that was begun for it.
        command: What was typed.
        **crew: Further arguments of :class:`ablations.crew.Crew`.

    Raises:
        SettingsError: If it cannot be a comparison, or was begun as something else.
        StoreError: If another driver runs it.
        Stopped: If a signal asked to stop; the same command goes on from there.
    """
    check_name(name)
    study.check()
    store = Store()
    if run_id:
        store.record_beside(run_id, f"study {name}")
    record = Record.open(store, name, study.declaration(), run_id, command)
    driver: Driver | SearchDriver
    if isinstance(study, Search):
        driver = SearchDriver(study, record, search_ledger(store, name, study, storage), retries=retries)
        what = study.summary()
    else:
        driver = Driver(study, record, ledgers(store, name, study, storage), retries=retries)
        plan = changed(study, record.changes())
        what = f"{len(plan.levels)} levels x {plan.study.seeds} seeds"
    count = workers or max(1, len(visible_gpus()))
    print(f"{study.question}\n{name}: {what}, {count} worker(s)")
    print(f"watch it: mmphi studies {name} --watch\nOptuna: optuna-dashboard {storage_url(store, storage)}", flush=True)
    try:
        driver.run(count, logs_folder(store, name), **crew)
    except KeyboardInterrupt as error:
        record.finish("KILLED")
        raise Stopped(f"stopped; `mmphi ablate {name}` goes on from there") from error
    except BaseException:
        record.finish("FAILED")
        raise
    record.finish("FINISHED")
    print(f"finished: mmphi report ablation --study {name}", file=sys.stdout, flush=True)
    return 0
