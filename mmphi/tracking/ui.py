"""``mmphi ui``: MLflow's pages, opened on the training runs.

By itself MLflow 3 opens on its pages for agents, where there is nothing of ours to see.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Sequence

from mmphi.config.arguments import CommandParser
from mmphi.errors import StoreError
from mmphi.logs import LOGGER
from mmphi.tracking.uri import absolute_uri, database

HOST, TRAINING = "127.0.0.1", "workflowType=machine_learning"
PATIENCE_S = 120.0


def addresses(base: str, experiment: str, shared: str = "") -> dict[str, str]:
    """The addresses of an experiment's runs: as a table, and as charts.

    Args:
        base: Address of the pages.
        experiment: ID of the experiment.
        shared: What :func:`mmphi.tracking.view_state.share` returns.
    """
    runs = f"{base}/#/experiments/{experiment}/runs?{TRAINING}{f'&{shared}' if shared else ''}"
    return {"runs": runs, "charts": f"{runs}&compareRunsMode=CHART"}


def experiment_id(uri: str) -> str:
    """The experiment with the newest run, or MLflow's own first one where there is no run."""
    file = database(uri)
    if file is not None and file.exists():
        newest = "SELECT experiment_id FROM runs WHERE lifecycle_stage = 'active' ORDER BY start_time DESC LIMIT 1"
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(file)) as connection:
            row = connection.execute(newest).fetchone()
            return str(row[0]) if row else "0"
    return "0"


def main(arguments: list[str]) -> int:
    """``mmphi ui``.

    Raises:
        StoreError: If the port is taken, or the store is a server that has pages of its own.
    """
    parser = CommandParser(prog="mmphi ui", description="MLflow's pages, opened on the training runs")
    parser.add_argument("--port", type=int, default=5000, help="port on 127.0.0.1 [5000]")
    parser.add_argument("--no-browser", action="store_true", help="only say where the pages are")
    options = parser.parse_args(arguments)
    uri = absolute_uri()
    if uri.startswith("http"):
        raise StoreError(f"{uri} is a server with pages of its own", "open it in a browser")
    if port_is_open(options.port):
        raise StoreError(f"port {options.port} of {HOST} is taken", "give another: --port 5001")
    experiment = experiment_id(uri)
    pages = addresses(f"http://{HOST}:{options.port}", experiment, shared_view(uri, experiment))
    return serve(uri, options.port, pages, browser=not options.no_browser)


def shared_view(uri: str, experiment: str, first: Sequence[str] = (), key: str = "mmphi") -> str:
    """The view of an experiment that shows results first; empty where the store cannot be written to."""
    from mlflow.exceptions import MlflowException

    from mmphi.tracking.connect import connect
    from mmphi.tracking.view_state import share

    try:
        return share(connect(uri), experiment, first, key)
    except MlflowException as error:
        LOGGER.warning(f"MLflow's own order of charts is used: {error}")
        return ""


def port_is_open(port: int) -> bool:
    """Whether something answers on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def serve(uri: str, port: int, pages: dict[str, str], *, browser: bool) -> int:
    """Run MLflow's pages until they are stopped.

    Args:
        uri: Of the store.
        port: On 127.0.0.1.
        pages: Addresses by name, said as soon as the pages are there.
        browser: Whether the first of them is opened.
    """
    threading.Thread(target=_announce, args=(pages, port, browser), daemon=True).start()
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", HOST]
    # One process serves one user. Of several, those that are slow to answer, as beside a training, are killed.
    command += ["--port", str(port), "--workers", "1"]
    process = subprocess.Popen(command, env={**os.environ, "MLFLOW_TRACKING_URI": uri})
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        return process.wait()


def _announce(pages: dict[str, str], port: int, browser: bool) -> None:
    """Say where the pages are as soon as they are there."""
    begun = time.monotonic()
    while time.monotonic() - begun < PATIENCE_S:
        if port_is_open(port):
            break
        time.sleep(0.2)
    print("\n".join(["", *(f"{name:<8}{address}" for name, address in pages.items()), ""]), flush=True)
    if browser:
        with contextlib.suppress(webbrowser.Error):
            webbrowser.open(next(iter(pages.values())))
