"""A connection to MLflow's store that fails soon and in words where there is none."""

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

BUSY, BUSY_S = "MMPHI_BUSY_S", "60"  # Seconds that a locked SQLite database is waited for.
ARTIFACT_ROOT = "_MLFLOW_SERVER_ARTIFACT_ROOT"  # Where MLflow's SQLite store takes its default artifact root from.


def connect(uri: str) -> MlflowClient:
    """A client of a store that answers; a SQLite store is made where it is missing.

    Raises:
        StoreError: If the store cannot be used.
    """
    _reachable(uri)
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    file = database(uri)
    # Artifacts lie beside the database: by itself MLflow makes `mlruns` in whatever folder is the current one.
    root = _environment(ARTIFACT_ROOT, (file.parent / "mlruns").as_uri()) if file else contextlib.nullcontext()
    try:
        with root:
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)
    except Exception as error:  # Of MLflow, SQLAlchemy, SQLite or the file system.
        explained = store_error(error, uri)
        if explained is not None and not explained.what.startswith("the tracking store"):
            raise explained from error
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise StoreError(f"the tracking store {uri} cannot be used: {first}", "check MLFLOW_TRACKING_URI") from error
    return client


@event.listens_for(Engine, "connect")
def _wait_for_locks(connection: Any, _: Any) -> None:
    """Let SQLite wait for another process that writes, in place of its 5 s."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute(f"PRAGMA busy_timeout = {int(busy_s() * 1000)}")


def busy_s() -> float:
    """Seconds that a locked SQLite database is waited for; ``MMPHI_BUSY_S``, by default 60."""
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
    """Fail at once where a server does not answer; MLflow itself tries for minutes."""
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
