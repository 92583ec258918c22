"""Translates errors of MLflow, SQLAlchemy and SQLite into messages with a remedy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from mmphi.errors import StoreError

OF_A_STORE = ("mlflow", "sqlalchemy", "sqlite3", "alembic")
RUN = re.compile(r"\b[0-9a-f]{32}\b")
# Pattern in the error text, message, hint.
KNOWN = (
    (
        "database is locked",
        "the database {uri} is locked by another process",
        "wait for it, or stop it; the same command resumes. Many processes need a server: `mlflow server`",
    ),
    (
        r"file is not a database|disk image is malformed",
        "{uri} is no SQLite database, or is damaged",
        "restore a copy of it, or set MLFLOW_TRACKING_URI to another file",
    ),
    (
        r"readonly database|read-only|attempt to write",
        "the database {uri} cannot be written",
        "make the file and its folder writable, or set MLFLOW_TRACKING_URI to another file",
    ),
    (
        "unable to open database file",
        "the database {uri} cannot be opened",
        "check that its folder is there and that you may write to it",
    ),
    (
        r"database or disk is full|No space left",
        "the disk of the database {uri} is full",
        "make room; the same command resumes",
    ),
    (
        r"Run with id=\S+ not found|run .*must be in (the )?'?active|run \S+ is deleted",
        "run {run} was deleted while it was needed",
        "`mlflow runs restore --run-id {run}` brings it back; without it the same command builds it again",
    ),
    (
        r"[Ee]xperiment.*(not found|does not exist|No )|No Experiment with id",
        "the experiment is not in {uri}, or was deleted: {first}",
        "unset MLFLOW_EXPERIMENT_ID, or name one that `mlflow experiments search` lists",
    ),
    (
        r"[Cc]an't locate revision|out of date|out-of-date",
        "{uri} was made by another version of MLflow: {first}",
        "`mlflow db upgrade {uri}` brings it to this version; keep a copy of it",
    ),
)


def store_error(error: BaseException, uri: str = "") -> StoreError | None:
    """Returns a readable error for an exception of the tracking store; ``None`` for other exceptions.

    Args:
        error: The exception; its causes are considered too.
        uri: URI of the store; by default :func:`absolute_uri`.
    """
    found = next((each for each in _chain(error) if type(each).__module__.partition(".")[0] in OF_A_STORE), None)
    if found is None:
        return None
    from mmphi.tracking.uri import absolute_uri

    text = "\n".join(str(each) for each in _chain(error))
    first = next(iter(str(found).strip().splitlines()), type(found).__name__)
    run = next(iter(RUN.findall(text)), os.environ.get("MLFLOW_RUN_ID", "?"))
    of_optuna = any(type(each).__module__.startswith("optuna") for each in _chain(error))
    name = "Optuna's storage" if of_optuna else _without_password(uri or absolute_uri())
    filled = {"uri": name, "run": run, "first": first}
    for pattern, what, hint in KNOWN:
        if re.search(pattern, text):
            return StoreError(what.format(**filled), hint.format(**filled))
    return StoreError(f"the tracking store {name} refused: {first}", "check MLFLOW_TRACKING_URI")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and its causes; an implicit ``__context__`` is followed only from errors of a store."""
    while error is not None:
        yield error
        of_a_store = type(error).__module__.partition(".")[0] in (*OF_A_STORE, "optuna")
        handled = error.__context__ if of_a_store and not error.__suppress_context__ else None
        error = error.__cause__ or handled


def _without_password(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//...@", uri)
