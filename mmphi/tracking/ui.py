"""``mmphi ui``: MLflow's pages, opened on the training runs.

By default, MLflow 3 opens its pages for agents, which show no training runs.
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
    """Returns the URLs of an experiment's runs as a table (``runs``) and as charts (``charts``).

    Args:
        base: Base URL of the pages.
        experiment: ID of the experiment.
        shared: Query parameter from :func:`mmphi.tracking.view_state.share`; empty for MLflow's own view.
    """
    runs = f"{base}/#/experiments/{experiment}/runs?{TRAINING}{f'&{shared}' if shared else ''}"
    return {"runs": runs, "charts": f"{runs}&compareRunsMode=CHART"}


def experiment_id(uri: str) -> str:
    """ID of the experiment with the newest run; ``0``, MLflow's default experiment, if there is no run."""
    file = database(uri)
    if file is not None and file.exists():
        newest = "SELECT experiment_id FROM runs WHERE lifecycle_stage = 'active' ORDER BY start_time DESC LIMIT 1"
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(file)) as connection:
            row = connection.execute(newest).fetchone()
            return str(row[0]) if row else "0"
    return "0"


def main(arguments: list[str]) -> int:
    """Entry point of ``mmphi ui``.

    Raises:
        StoreError: If the port is taken, or the store is a tracking server, which serves these pages itself.
    """
    parser = CommandParser(prog="mmphi ui", description="MLflow's pages, opened on the training runs")
    parser.add_argument("--port", type=int, default=5000, help="port on 127.0.0.1 [5000]")
    parser.add_argument("--no-browser", action="store_true", help="print the URLs without opening a browser")
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
    """Store a view of an experiment that shows results first; returns its query parameter, empty on errors.

    Args:
        uri: URI of the store.
        experiment: ID of the experiment.
        first: Metrics to show before the default ones.
        key: Name of the view.
    """
    from mlflow.exceptions import MlflowException

    from mmphi.tracking.connect import connect
    from mmphi.tracking.view_state import share

    try:
        return share(connect(uri), experiment, first, key)
    except MlflowException as error:
        LOGGER.warning(f"MLflow's own order of charts is used: {error}")
        return ""


def port_is_open(port: int) -> bool:
    """Whether a server accepts connections on a local port."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def serve(uri: str, port: int, pages: dict[str, str], *, browser: bool) -> int:
    """Run MLflow's server until it is stopped, and return its exit code.

    Args:
        uri: URI of the store.
        port: Port on 127.0.0.1.
        pages: URLs by name, printed once the server accepts connections.
        browser: Whether to open the first URL in a browser.
    """
    threading.Thread(target=_announce, args=(pages, port, browser), daemon=True).start()
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", HOST]
    # One worker is enough for one user. With several, slow ones are killed, as during a training.
    command += ["--port", str(port), "--workers", "1"]
    process = subprocess.Popen(command, env={**os.environ, "MLFLOW_TRACKING_URI": uri})
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        return process.wait()


def _announce(pages: dict[str, str], port: int, browser: bool) -> None:
    """Print the URLs once the server accepts connections, at the latest after ``PATIENCE_S``."""
    begun = time.monotonic()
    while time.monotonic() - begun < PATIENCE_S:
        if port_is_open(port):
            break
        time.sleep(0.2)
    print("\n".join(["", *(f"{name:<8}{address}" for name, address in pages.items()), ""]), flush=True)
    if browser:
        with contextlib.suppress(webbrowser.Error):
            webbrowser.open(next(iter(pages.values())))
