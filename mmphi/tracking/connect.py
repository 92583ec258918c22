"""A connection to MLflow's store that fails soon and in words where there is none."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlparse

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from mmphi.errors import StoreError
from mmphi.tracking.uri import database

ARTIFACT_ROOT = "_MLFLOW_SERVER_ARTIFACT_ROOT"  # Where MLflow's SQLite store takes its default artifact root from.


def connected(uri: str) -> MlflowClient:
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
    except (MlflowException, OSError) as error:
        first = str(error).splitlines()[0]
        raise StoreError(f"the tracking store {uri} cannot be used: {first}", "check MLFLOW_TRACKING_URI") from error
    return client


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
