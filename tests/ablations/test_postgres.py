"""Several drivers on one study in a real PostgreSQL server, which the tests start where it is installed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import toy_studies
from builders import unavailable
from optuna.trial import TrialState
from sqlalchemy import create_engine, text
from test_search import SEARCH
from toy_studies import COMMAND, STUDY, driver, results

from ablations.paths import logs_folder, search_storage
from ablations.search_driver import SearchDriver
from ablations.study_run import StudyRun
from ablations.trial_storage import TrialStorage, connect
from ablations.trials import TrialSpec
from mmphi.errors import SettingsError, StoreError
from mmphi.tracking.run_writer import TrackingStore
from reports.study_query import Trial, load_study

pytestmark = [pytest.mark.database, pytest.mark.usefixtures("forked_workers")]


def program(name: str) -> str | None:
    """A program of PostgreSQL, which Debian keeps off the path."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ["PATH"]]))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an empty database."""
    initdb, pg_ctl = program("initdb"), program("pg_ctl")
    if not initdb or not pg_ctl:
        unavailable("PostgreSQL is not installed")
    folder = Path(tmp_path_factory.mktemp("postgres"))
    # The server refuses to run as root, and the folders above must let its user in.
    user = ["runuser", "-u", "nobody", "--"] if os.getuid() == 0 else []
    if user:
        folder = Path(f"/tmp/mmphi-postgres-{os.getpid()}")
        folder.mkdir()
        shutil.chown(folder, "nobody")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data, log = folder / "data", folder / "log"
    subprocess.run(
        [*user, initdb, "-D", str(data), "-U", "mmphi", "-A", "trust"], check=True, capture_output=True, cwd="/"
    )
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
    start = [*user, pg_ctl, "-D", str(data), "-l", str(log), "-w", "-o", options, "start"]
    subprocess.run(start, check=True, capture_output=True, cwd="/")
    yield f"postgresql+psycopg://mmphi@127.0.0.1:{port}/postgres"
    subprocess.run([*user, pg_ctl, "-D", str(data), "-m", "immediate", "stop"], capture_output=True, cwd="/")
    shutil.rmtree(folder, ignore_errors=True)


def begin(seeds: int, storage: str, **environment: str) -> subprocess.Popen[str]:
    script = [sys.executable, str(Path(toy_studies.__file__)), "drive", str(seeds), "1", storage]
    path = os.pathsep.join([str(Path(toy_studies.__file__).parent), str(Path(__file__).parents[2])])
    merged = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.Popen(script, env=merged, stdout=subprocess.PIPE, text=True)


def begun_trials() -> list[Trial]:
    """None while the study's record is still being written."""
    try:
        return list(load_study(TrackingStore(), "toy").trials)
    except (SettingsError, StoreError):
        return []


def test_two_drivers_share_a_study_and_one_dies(empty_store: str, server: str) -> None:
    """Each cell is run once; what the dead driver had is taken over when its heartbeat is old."""
    # `MMPHI_HOST` and its own lock folder would make them two machines; here the file locks serve both.
    one = begin(2, server, MMPHI_LEASE_S="4")
    two = begin(2, server, MMPHI_LEASE_S="4")
    assert one.stdout is not None
    assert one.stdout.readline() == "driving\n"
    while not {str(worker.pid) for worker in psutil.Process(one.pid).children()} & {
        trial.tags.get("mmphi.pid") for trial in begun_trials()
    }:
        assert one.poll() is None
        time.sleep(0.1)
    one.kill()
    one.wait()
    out, _ = two.communicate(timeout=200)
    assert two.returncode == 0
    found = json.loads(out.splitlines()[-1])
    study = replace(STUDY, seeds=2)
    assert set(found) == {c for c in found if found[c] is not None}
    assert sum(name.startswith("verdict/") for name in found) == 6
    made = driver(study, storage=server)
    assert results(made) == pytest.approx(found)
    data = load_study(TrackingStore(), "toy")
    runs = Counter((t.phase, t.level, t.seed, t.params["projector.learning_rate"]) for t in data.trials if t.finished)
    assert set(runs.values()) == {1}
    assert data.missing() == []


def test_a_cell_that_two_drivers_ask_for_goes_to_one(server: str) -> None:
    storages = [TrialStorage(server, "race", ["minimize"]) for _ in range(2)]
    cell = TrialSpec("verdict", "two", 0)
    first = storages[0].take(cell, 0)
    assert first is not None
    assert storages[1].take(cell, 0) is None
    assert storages[1].running() == {cell.name}
    storages[0].tell(first, [1.5], "run")
    (outcome,) = storages[1].outcomes()
    assert (outcome.cell, outcome.value) == (cell, 1.5)


def test_silent_driver_loses_its_trials(server: str) -> None:
    """The last heartbeat of one driver is set an hour back in the database."""
    alive, silent = (TrialStorage(server, "silent", ["minimize"]) for _ in range(2))
    kept, lost = TrialSpec("verdict", "two", 0), TrialSpec("verdict", "two", 1)
    assert alive.take(kept, 0) is not None
    assert silent.take(lost, 0) is not None
    (number,) = silent.mine
    trial_id = silent.mine[number]._trial_id
    alive.beat()
    assert alive.running() == {kept.name, lost.name}
    with create_engine(server).begin() as database:
        change = "UPDATE trial_heartbeats SET heartbeat = heartbeat - interval '1 hour' WHERE trial_id = :trial"
        assert database.execute(text(change), {"trial": trial_id}).rowcount == 1
    alive.beat()
    assert alive.running() == {kept.name}
    assert alive.outcomes() == []  # It is no result: the cell is asked for again.


def test_server_that_is_not_there() -> None:
    with pytest.raises(StoreError, match=r"postgresql\+psycopg://\.\.\.@127\.0\.0\.1:1/none cannot be used") as error:
        connect("postgresql+psycopg://user:secret@127.0.0.1:1/none")
    assert "secret" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")  # The test itself asks Optuna without Study.optimize.
def test_search_of_two_drivers_has_as_many_trials_as_were_asked_for(empty_store: str, server: str) -> None:
    """One finds what the other left when it fell silent; what both put in the queue is run once."""
    search = replace(SEARCH, pruner="", seeds=(0,), trials=3)
    store = TrackingStore()
    record = StudyRun.open(store, "shared", search.declaration())
    one, two = (SearchDriver(search, record, search_storage(store, "shared", search, server)) for _ in range(2))
    left = one.storage.study.ask(search.distributions())
    running = two.storage.study.ask(search.distributions())  # A third driver's, which lives.
    one.storage.fail(left, "its driver fell silent", final=False)
    waiting = one.storage.trials(TrialState.WAITING)
    assert waiting == []
    one._ask_again()
    attributes = {"origin": left.number, "again_of": left.number}
    two.storage.study.enqueue_trial(left.params, user_attrs=attributes)  # At the very same moment.
    two.storage.study.tell(running, 9.0)
    two.run(1, logs_folder(store, "shared"), command=COMMAND)
    ended = two.storage.trials(TrialState.COMPLETE)
    assert len(ended) == two.done() == 3
    assert len({t.user_attrs.get("origin", t.number) for t in ended}) == 3
    assert sum(t.params == left.params and t.user_attrs.get("again_of") == left.number for t in ended) == 1
