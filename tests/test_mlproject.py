"""The project as `mlflow run` starts it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import small
import yaml

from mmphi.cli import parse
from mmphi.config.overrides import full_name
from mmphi.stages import STAGES, Settings
from mmphi.tracking.run_writer import TrackingStore
from reports.study_query import load_study

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["-P", "train_images=8", "-P", "test_images=2", "-P", "validation_images=1", "-P", "texts=3"]
ENTRY_POINTS: dict[str, Any] = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]


EARLIER = {
    "projector": "seed steps batch_size learning_rate layers",
    "scenes": "seed train_images",
    "textgen": "model generators stop prompted max_tokens store_only corpus spool seed",
    "tokens": "corpus",
    "pretrain": "corpus size stop seed steps batch_size batch_tokens optimizer learning_rate layers width",
    "light_clip": "seed steps batch_size learning_rate",
    "qlora": "model seed steps batch_size learning_rate rank alpha",
    "merge": "model precision",
    "transcribe": "path whisper backend language",
    "listen": "path whisper",
    "speech": "path link model whisper steps seed",
    "export": "model stage precision",
    "evaluate": "stage model split checkpoint",
}


def test_every_stage_has_an_entry_point() -> None:
    assert set(ENTRY_POINTS) == {"main", *STAGES, "ablate", "report"}
    assert ENTRY_POINTS["main"] == ENTRY_POINTS["projector"]


@pytest.mark.parametrize("name", ["main", *STAGES])
def test_parameters_are_settings_and_all_are_passed_on(name: str) -> None:
    parameters, command = ENTRY_POINTS[name]["parameters"], ENTRY_POINTS[name]["command"]
    assert set(parameters) == {"preset"}  # A default of any other would be recorded as a parameter of every run.
    python, module, package, stage, *rest = command.format(**{k: p["default"] for k, p in parameters.items()}).split()
    assert (python, module, package, stage) == ("python3", "-m", "mmphi", "projector" if name == "main" else name)
    assert parse(rest) == ({"preset": "tiny"}, {})


def test_short_names_of_earlier_versions_are_known() -> None:
    """`mlflow run -P NAME=VALUE` of earlier versions, where these were parameters of MLproject."""
    for stage, names in EARLIER.items():
        for name in names.split():
            assert full_name(Settings, name, stage)


def test_conda_environment_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [
        each for name in ("serve", "audio", "textgen", "reports") for each in project["optional-dependencies"][name]
    ]
    wanted = sorted([*project["dependencies"], *extras], key=str.lower)
    packages = yaml.safe_load((ROOT / "conda.yaml").read_text())["dependencies"]
    (pip,) = [each["pip"] for each in packages if isinstance(each, dict)]
    assert pip[0] == "--constraint constraints.txt"
    assert sorted(pip[1:], key=str.lower) == [re.split("[<>=]", requirement)[0] for requirement in wanted]
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {name.lower().replace("_", "-") for name in pip[1:]} <= {name.replace("_", "-") for name in pinned}


def mlflow_run(
    folder: Path, *arguments: str, entry: str = "scenes", env_manager: str = "local", **environment: str
) -> str:
    bin_folder = str(Path(sys.executable).parent)
    path = os.pathsep.join([bin_folder, os.environ["PATH"]])
    command = [sys.executable, "-m", "mlflow", "run", str(ROOT), "-e", entry, "--env-manager", env_manager]
    done = subprocess.run(
        [*command, *(SMALL if entry == "scenes" else []), *arguments],
        cwd=folder,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


@pytest.mark.slow
def test_from_another_folder_with_a_relative_store(tmp_path: Path, empty_store: str) -> None:
    """The command starts in the project's folder, yet records in the database beside the caller."""
    folder = Path(empty_store.removeprefix("sqlite:///")).parent
    arguments = ("--experiment-name", "another", "-P", "image_size=32")
    said = mlflow_run(folder, *arguments, MLFLOW_TRACKING_URI="sqlite:///mlflow.db")
    assert "scenes: building" in said
    store = TrackingStore(empty_store)
    (run,) = store.search(stage="scenes")
    assert store.is_result(run)
    assert run.data.params["train_images"] == "8"
    assert run.data.params["scenes.train_images"] == "8"
    assert "seed" not in run.data.params
    assert "force" not in run.data.params
    assert run.data.params["scenes.seed"] == "0"
    assert store.client.get_experiment(run.info.experiment_id).name == "another"
    assert run.info.run_name.startswith("scenes tiny train_images=8")
    said = mlflow_run(tmp_path, *arguments, "--run-name", "mine")
    assert f"reusing run {run.info.run_id}" in said
    experiment = [str(run.info.experiment_id)]
    names = {r.info.run_name: r.data.tags for r in store.client.search_runs(experiment)}
    assert names["mine"]["mmphi.reuses"] == run.info.run_id


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_in_an_environment_that_uv_makes_of_conda_yaml(tmp_path: Path, empty_store: str) -> None:
    """Without conda, and without the packages that this test runs with."""
    if shutil.which("uv", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("uv is not in this environment")
    said = mlflow_run(tmp_path, env_manager="uv", MLFLOW_ENV_ROOT=str(tmp_path / "environments"))
    assert "scenes: building" in said
    (run,) = TrackingStore(empty_store).search(stage="scenes")
    assert run.info.status == "FINISHED"
    (python,) = (tmp_path / "environments").rglob("bin/python3")
    packages = [sys.executable, "-m", "uv", "pip", "list", "--python", str(python), "--format", "freeze"]
    found = subprocess.run(packages, check=True, capture_output=True, text=True).stdout
    pinned = (ROOT / "constraints.txt").read_text().lower().split()
    assert {line for line in pinned if line.startswith(("torch==", "mlflow==", "optuna=="))} <= set(
        found.lower().split()
    )


@pytest.mark.slow
def test_a_study_and_its_report(tmp_path: Path, empty_store: str) -> None:
    """The run that MLflow began is the study's record; the report is in it, and in the run that was begun for it."""
    changes = {**small.SMALL, "seeds": "2", "tokens": "300", "workers": "1", "study": "control"}
    del changes["projector.steps"]
    parameters = [word for name, value in changes.items() for word in ("-P", f"{name}={value}")]
    said = mlflow_run(tmp_path, *parameters, entry="ablate")
    assert "control: 2 levels x 2 seeds = 4 verdict trials, 300 supervised tokens each; 1 worker(s)" in said
    assert "no difference can be shown" in said
    store = TrackingStore(empty_store)
    data = load_study(store, "control")
    record = store.run(data.run_id)
    assert record.info.run_name == "study control"
    assert record.data.params["study"] == "control"
    assert data.missing() == []
    assert record.data.tags["mmphi.command"].startswith("mmphi ablate control")
    assert {t.seed for t in data.trials} == {0, 1}
    out = tmp_path / "out"
    mlflow_run(tmp_path, "-P", "study=control", "-P", f"out={out}", entry="report")
    assert "with 2 seeds" in (out / "report.md").read_text()
    (written,) = store.client.search_runs([record.info.experiment_id], "attributes.run_name = 'report control'")
    for run_id in (data.run_id, written.info.run_id):
        assert "report/report.html" in {f.path for f in store.client.list_artifacts(run_id, "report")}


def test_python_without_the_packages_hands_over_to_the_projects_own(tmp_path: Path) -> None:
    (tmp_path / "mmphi").mkdir()
    for name in ("__init__.py", "__main__.py"):
        (tmp_path / "mmphi" / name).write_text((ROOT / "mmphi" / name).read_text())
    bare = [sys.executable, "-S", "-m", "mmphi", "scenes", "--layers", "2"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(bare, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "lacks mmphi's packages" in done.stderr
    own = tmp_path / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.write_text('#!/bin/sh\necho own "$@"\n')
    own.chmod(0o755)
    done = subprocess.run(bare, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "own -m mmphi scenes --layers 2\n"
