"""Downloads of artifacts from remote stores: once per run, complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from mlflow.exceptions import MlflowException

from mmphi.errors import StoreError
from mmphi.pipeline.manifest import MANIFEST, manifest_holds

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


def fetch_result(client: MlflowClient, run_id: str, runs: Path) -> Path:
    """Returns a local folder with the artifacts of a finished run; downloads them if needed.

    Args:
        client: MLflow client of the store.
        run_id: ID of the run.
        runs: Folder of downloaded runs. If several processes request the same run, one downloads and the others wait.

    Raises:
        StoreError: If the artifacts cannot be downloaded, or do not match the manifest.
    """
    folder, part = runs / run_id, runs / f"{run_id}.part"
    runs.mkdir(parents=True, exist_ok=True)
    with FileLock(runs / f"{run_id}.lock"):
        if manifest_holds(folder):
            return folder
        for left in (folder, part):
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir()
        download(client, run_id, part)
        if not manifest_holds(part):
            raise StoreError(f"the artifacts of run {run_id} are not what its manifest says", "delete that run")
        for name, (_, _, modified_ns) in json.loads((part / MANIFEST).read_text()).items():
            os.utime(part / name, ns=(modified_ns, modified_ns))
        part.rename(folder)
    return folder


def download(client: MlflowClient, run_id: str, folder: Path) -> None:
    """Download all artifacts of a run into a folder.

    Raises:
        StoreError: If they cannot be downloaded.
    """
    try:
        client.download_artifacts(run_id, "", str(folder))
    except (MlflowException, OSError) as error:
        raise StoreError(f"the artifacts of run {run_id} cannot be fetched: {error}", "try again later") from error


def remove_artifacts(client: MlflowClient, run_id: str, name: str) -> None:
    """Remove a folder of a run's remote artifacts, if the artifact store supports deletion."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        uri = client.get_run(run_id).info.artifact_uri
        repository: Any = get_artifact_repository(uri, tracking_uri=client.tracking_uri)
        repository.delete_artifacts(name)
    except (MlflowException, NotImplementedError, OSError):  # The folder is kept; it only takes up space.
        return
