"""Connects to MLflow's store, with fast and readable errors if that is not possible."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sqlite3
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlparse

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow.tracking import MlflowClient
from sqlalchemy import event
from sqlalchemy.engine import Engine

from mmphi.errors import StoreError
from mmphi.tracking.error_messages import store_error
from mmphi.tracking.uri import database

BUSY, BUSY_S = "MMPHI_BUSY_S", "60"  # Variable and default: seconds to wait for a locked SQLite database.
ARTIFACT_ROOT = "_MLFLOW_SERVER_ARTIFACT_ROOT"  # Variable with the default artifact root of MLflow's SQLite store.


def connect(uri: str) -> MlflowClient:
    """Returns a client whose store is reachable; a missing SQLite database is created.

    Raises:
        StoreError: If the store cannot be used.
    """
    _reachable(uri)
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    file = database(uri)
    # Artifacts are stored next to the database; MLflow's default is `mlruns` in the current folder.
    root = _environment(ARTIFACT_ROOT, (file.parent / "mlruns").as_uri()) if file else contextlib.nullcontext()
    try:
        with root:
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)
    except Exception as error:  # Any error of MLflow, SQLAlchemy, SQLite or the file system.
        explained = store_error(error, uri)
        if explained is not None and not explained.what.startswith("the tracking store"):
            raise explained from error
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise StoreError(f"the tracking store {uri} cannot be used: {first}", "check MLFLOW_TRACKING_URI") from error
    return client


@event.listens_for(Engine, "connect")
def _wait_for_locks(connection: Any, _: Any) -> None:
    """Set SQLite's timeout for a database locked by another process; its default is 5 s."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute(f"PRAGMA busy_timeout = {int(busy_s() * 1000)}")


def busy_s() -> float:
    """Seconds to wait for a locked SQLite database: ``MMPHI_BUSY_S``, by default 60."""
    try:
        return float(os.environ.get(BUSY, BUSY_S))
    except ValueError:
        return float(BUSY_S)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ.setdefault(name, value)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def _reachable(uri: str) -> None:
    """Raise after at most 10 s if a server is unreachable; MLflow itself retries for minutes."""
    parsed = urlparse(uri)
    host = parsed.hostname or ""
    proxied = parsed.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host)
    if parsed.scheme not in ("http", "https") or proxied:
        return
    port = parsed.port or (443 if parsed.scheme == "https" else 80)
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        raise StoreError(f"the tracking server {uri} does not answer: {error}", "check MLFLOW_TRACKING_URI") from error
