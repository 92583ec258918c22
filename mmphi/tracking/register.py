"""``mmphi register``: registers a run's model in MLflow's model registry."""

from __future__ import annotations

from collections.abc import Sequence

from mlflow.exceptions import MlflowException

from mmphi.config.arguments import CommandParser
from mmphi.errors import StoreError
from mmphi.tracking.logged_model import MLMODEL, log_model, logged_model
from mmphi.tracking.run_writer import TrackingStore


def register(store: TrackingStore, run_id: str, name: str, alias: str = "") -> str:
    """Register a run's model and return its URI, ``models:/NAME/VERSION``.

    Args:
        store: Tracking store of the run.
        run_id: ID of a finished run whose result is a model.
        name: Registered name; created if new, else a new version is added.
        alias: Alias to set to this version; empty for none.

    Raises:
        StoreError: If the run's result is not a model, or the name cannot be used.
    """
    run = store.run(run_id)
    model = logged_model(run)
    try:
        if not model:
            folder = store.fetch(run)
            if run.info.status != "FINISHED" or not (folder / MLMODEL).exists():
                raise StoreError(f"run {run_id} did not end in a model", "give that of pretrain, projector, qlora, ...")
            model = log_model(store.client, run, folder, run.data.tags.get("mmphi.stage", "model"))
        if not store.client.search_registered_models(f"name = '{name}'"):
            store.client.create_registered_model(name)
        version = store.client.create_model_version(name, f"models:/{model}", run_id=run_id, model_id=model)
        if alias:
            store.client.set_registered_model_alias(name, alias, version.version)
    except MlflowException as error:
        raise StoreError(f"{name} cannot be registered: {error.message}") from error
    return f"models:/{name}/{version.version}"


def main(arguments: Sequence[str]) -> int:
    """``mmphi register``."""
    parser = CommandParser(
        prog="mmphi register",
        description="Register a run's model: `mlflow models serve -m models:/NAME/1 --env-manager local` serves it, and"
        " every --model takes that name.",
    )
    parser.add_argument("run", help="id of a run that ended in a model")
    parser.add_argument("name", help="registered name; created if new, else a new version is added")
    parser.add_argument("--alias", default="", help="points to this version from now on: models:/NAME@ALIAS")
    options = parser.parse_args(list(arguments))
    print(register(TrackingStore(), options.run, options.name, options.alias))
    return 0
