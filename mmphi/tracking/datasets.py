"""Records the data of a run as MLflow datasets, by which MLflow's pages filter and compare runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.entities import Dataset, DatasetInput, InputTag

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from mmphi.pipeline.stage import Result

DIGEST_CHARACTERS = 36  # MLflow's limit.
DATA_SECTIONS = ("data.", "corpus.", "speech.", "transcribe.")
DATA_STAGES = ("scenes", "tokens", "textgen", "listen", "transcribe")


def datasets_of(parts: Mapping[str, Any], settings: Mapping[str, Any], needed: Mapping[str, Result]) -> list[Dataset]:
    """Returns the data files that settings name, and the data produced by upstream stages, as MLflow datasets.

    Args:
        parts: Parts of the run's key, with digests of files by setting.
        settings: Values of all settings by full name.
        needed: Upstream results by stage name.
    """
    found = []
    for name, digest in parts.items():
        path = str(settings.get(name, ""))
        if name.startswith(DATA_SECTIONS) and str(digest).startswith("sha256:") and path:
            short = str(digest).removeprefix("sha256:")[:DIGEST_CHARACTERS]
            found.append(Dataset(Path(path).resolve().name or path, short, "local", path))
    for stage, result in needed.items():
        if stage in DATA_STAGES:
            found.append(Dataset(stage, result.key[:DIGEST_CHARACTERS], "mmphi", f"runs:/{result.run_id}"))
    return found


def log_datasets(client: MlflowClient, run_id: str, datasets: list[Dataset], context: str) -> None:
    """Record datasets as inputs of a run.

    Args:
        client: MLflow client of the store.
        run_id: ID of the run.
        datasets: Datasets from :func:`datasets_of`.
        context: ``training`` or ``evaluation``; MLflow shows it next to the names.
    """
    if datasets:
        tag = InputTag("mlflow.data.context", context)
        client.log_inputs(run_id, [DatasetInput(dataset, [tag]) for dataset in datasets])
