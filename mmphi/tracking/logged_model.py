"""Results as MLflow models, for ``mlflow models serve``, ``mlflow.pyfunc.load_model`` and MLflow's pages."""

from __future__ import annotations

import base64
import io
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from mlflow.entities import LoggedModelOutput, Metric, Run

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.tracking import MlflowClient

MLMODEL = "MLmodel"
LOADER = "mmphi.serving.pyfunc"  # Referenced by name; neither imported here nor pickled.
COLUMNS = ("question", "image", "audio", "system", "messages")
SHOWN_TAGS = ("mmphi.stage", "mmphi.key", "mmphi.preset", "mlflow.note.content")
RESULTS = ("val/", "test/", "public/", "floor/")
MOST_PARAMS = 100  # MLflow's limit per request.
NEEDS = ("mmphi", "torch", "transformers")


def write_mlmodel(folder: Path, *, sees: bool) -> None:
    """Add MLflow's model files to a saved model, so that MLflow can load it.

    Args:
        folder: Folder of the saved model.
        sees: Whether the input example has an image.
    """
    import mlflow.pyfunc

    with tempfile.TemporaryDirectory() as made:
        target = Path(made) / "model"
        mlflow.pyfunc.save_model(
            path=str(target),
            loader_module=LOADER,
            signature=_signature(),
            input_example=_example(sees),
            pip_requirements=[f"{name}=={version(name)}" for name in NEEDS],
        )
        for path in target.iterdir():
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _signature() -> Any:
    """Model signature, the same for all models: a question's inputs, and sampling parameters."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec("string", name, required=False) for name in COLUMNS]),
        outputs=Schema([ColSpec("string", "answer"), ColSpec("string", "heard")]),
        params=ParamSchema(
            [
                ParamSpec("max_tokens", "long", 256),
                ParamSpec("temperature", "double", 0.0),
                ParamSpec("top_p", "double", 1.0),
                ParamSpec("seed", "long", -1),  # Negative: a random seed. MLflow parameters need a default.
            ]
        ),
    )


def _example(sees: bool) -> pd.DataFrame:
    import pandas as pd

    row = {"question": "what is this?"}
    if sees:
        from PIL import Image

        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
        row["image"] = base64.b64encode(buffer.getvalue()).decode()
    return pd.DataFrame([row])


def log_model(client: MlflowClient, run: Run, folder: Path, name: str) -> str:
    """Log a finished run's model to MLflow and return the model's ID.

    In a local store, its files are hard links to those of the run and take no additional space.

    Args:
        client: MLflow client of the store.
        run: The finished run.
        folder: Folder of its files on this machine.
        name: Name of the model; need not be unique.
    """
    tags = {key: value for key, value in run.data.tags.items() if key in SHOWN_TAGS}
    model = client.create_logged_model(
        run.info.experiment_id,
        name=name,
        source_run_id=run.info.run_id,
        tags=tags,
        params=dict(list(run.data.params.items())[:MOST_PARAMS]),
        model_type="mmphi",
    )
    log_results(client, run, model.model_id)
    place = urlparse(model.artifact_location)
    if place.scheme in ("", "file"):
        _linked(folder, Path(unquote(place.path)))
    else:
        with tempfile.TemporaryDirectory() as part:
            _linked(folder, Path(part))
            client.log_model_artifacts(model.model_id, part)
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, 0)])
    return str(model.model_id)


def log_results(client: MlflowClient, run: Run, model_id: str) -> None:
    """Link a run's last metrics of validation, test, public text and loss floors to its model.

    Args:
        client: MLflow client of the store.
        run: The run, with its metrics.
        model_id: ID of the model.
    """
    # With unchanged timestamps and steps, MLflow deduplicates the values, and no curve gets a second point.
    results = [
        Metric(m.key, m.value, m.timestamp, m.step, model_id=model_id, run_id=run.info.run_id)
        for m in run.data._metric_objs  # MLflow has no public API for metrics with steps.
        if m.key.startswith(RESULTS)
    ]
    if results:
        client.log_batch(run.info.run_id, metrics=results)


def _linked(source: Path, target: Path) -> None:
    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:  # Another disk, or a file system without hard links.
            shutil.copyfile(one, other)

    training = shutil.ignore_patterns("checkpoint-*", ".*")  # Only needed to resume training.
    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True, ignore=training)


def logged_model(run: Run) -> str:
    """Returns the ID of a run's logged model; empty if none was logged."""
    outputs = run.outputs.model_outputs if run.outputs else []
    return str(outputs[0].model_id) if outputs else ""
