"""Fixtures. Heavy imports are inside them, because pytest-xdist's own process runs no tests and needs none."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from builders import Recorder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-golden", action="store_true", help="write the values of tests/golden again")


LONGEST = (
    "test_ray.py",
    "test_mlproject.py",
    "test_textgen_benchmark.py",
    "test_own_data.py",
    "test_whole.py",
    "test_qlora.py",
    "test_pretrain_texts.py",
    "test_driver.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no process is left alone with one of them at the end."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture
def own(tmp_path: Path) -> str:
    """An open_clip configuration of a ViT small enough for a test."""
    from builders import TINY_CLIP

    path = tmp_path / "own-tiny-clip.json"
    path.write_text(json.dumps(TINY_CLIP))
    return str(path)


@pytest.fixture
def weights(own: str, tmp_path: Path) -> str:
    """Weights of that ViT in a file."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    open_clip.add_model_config(own)
    model = open_clip.create_model("own-tiny-clip")

    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return str(tmp_path / "weights.safetensors")


@pytest.fixture(scope="session")
def tiny_whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a Whisper of English with random weights, as openai-whisper saves them: it hears nonsense, fast."""
    import torch
    from whisper.model import ModelDimensions, Whisper

    torch.manual_seed(0)
    shape = ModelDimensions(80, 1500, 16, 2, 1, 51864, 32, 16, 2, 1)
    path = tmp_path_factory.mktemp("whisper") / "random.en.pt"
    torch.save({"dims": asdict(shape), "model_state_dict": Whisper(shape).state_dict()}, path)
    return path


@pytest.fixture
def recorder() -> Recorder:
    from builders import Recorder

    return Recorder()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in one order, so that equal means equal."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def _database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tracking store's database without runs: making its tables takes seconds, copying it does not."""
    from mmphi.tracking.run_writer import TrackingStore

    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    TrackingStore(f"sqlite:///{path}")
    return path


@pytest.fixture
def empty_store(_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an empty tracking store, which is also the one that the environment names."""
    folder = tmp_path / "store"
    folder.mkdir()
    shutil.copy(_database, folder / "mlflow.db")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    return os.environ["MLFLOW_TRACKING_URI"]


@pytest.fixture(scope="session")
def small_chain(_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a store with all stages from scenes to the adapter, at the sizes of ``small``; not to be changed.

    It is built once for all processes of pytest-xdist.
    """
    import small

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "small-chain"
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            with small.built("qlora", _database.parent, folder) as pipeline:
                pipeline.build("projector", small.settings())  # And its evaluation.
                (folder / "complete").touch()
    return folder


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of studies are forked from a process that has imported everything, instead of started."""
    from forks import fork_workers

    fork_workers(monkeypatch)


@pytest.fixture
def real_models() -> Path:
    return _real("MMPHI_MODELS")


@pytest.fixture
def real_folder() -> Path:
    return _real("MMPHI_REAL")


@pytest.fixture
def real_photos() -> Path:
    return _real("MMPHI_PHOTOS")


def _real(variable: str) -> Path:
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} is not set")
    return Path(folder)


Factory = Callable[..., Any]
