"""mmphi adds image and audio input to causal language models, with every experiment tracked in MLflow.

>>> model = mmphi.load("RUN, FOLDER or models:/NAME/1")
>>> model.ask("what is this?", "photo.jpg")
>>> model.ask("", "photo.jpg", audio="question.mp3")

>>> model = mmphi.join(language="FOLDER or hub name", vision=encoder, preprocess=function)
>>> model.fit([(image, "a red circle"), ...], steps=60)
>>> model.save_pretrained("folder")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    from mmphi.api import Model
    from mmphi.pipeline.stage import Result


def _version() -> str:
    """Return the version of ``pyproject.toml``, as the installed package or a checkout that is not installed has it."""
    from importlib.metadata import PackageNotFoundError, version
    from pathlib import Path

    try:
        return version("mmphi")
    except PackageNotFoundError:  # `mlflow run --env-manager uv` installs the dependencies only.
        import tomllib

        project = Path(__file__).resolve().parents[1] / "pyproject.toml"
        return str(tomllib.loads(project.read_text())["project"]["version"]) if project.is_file() else "unknown"


__version__ = _version()
__all__ = ["build", "join", "load"]


def join(language: Any, vision: Any, **options: Any) -> Model:
    """Join a vision encoder and a causal language model by a projector; see :func:`mmphi.api.join`."""
    from mmphi.api import join
    from mmphi.pipeline.warning_filters import install_filters

    install_filters()
    return join(language, vision, **options)


def load(
    model: str | Path,
    *,
    device: str = "",
    language: str = "",
    precision: str = "",
    whisper: str = "",
    vision: nn.Module | None = None,
    preprocess: Callable[[Any], Any] | None = None,
) -> Model:
    """Load a trained model with its components; models in one process share equal components.

    Args:
        model: Folder, run id, or registered model (``models:/NAME/VERSION``) of a stage that produces a model.
        device: ``cpu`` or ``cuda:0``; by default this process's accelerator, else the CPU.
        language: Folder or hub name of the language model, if it has moved.
        precision: ``fp32``, ``bf16``, ``8bit`` or ``4bit`` for the language model; by default as in training.
        whisper: Size or file of the Whisper model for audio; by default that of the training, else tiny.en. It is
            loaded at the first recording.
        vision: Vision encoder, if :func:`join` was given a module.
        preprocess: Preprocessing of ``vision``.

    Raises:
        ModelError: If a component is missing, or differs from the one in training.
        StoreError: If the run or registered model does not exist.
    """
    from pathlib import Path

    import torch

    from mmphi.api import load as load_model
    from mmphi.pipeline.process_cache import PROCESS
    from mmphi.pipeline.warning_filters import install_filters

    install_filters()
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _folder_of(str(model))
    place = torch.device(device) if device else None
    parts = {"language": language, "precision": precision, "whisper": whisper}
    return load_model(folder, vision=vision, preprocess=preprocess, device=place, **parts, once=PROCESS.once)


def _folder_of(model: str) -> Path:
    """Folder of a run or registered model; a local SQLite store is read without importing mlflow."""
    from mmphi.tracking.status_reader import status_reader

    found = status_reader().folder(model.removeprefix("runs:/").partition("/")[0])
    if found is not None:
        return found
    from mmphi.tracking.run_writer import TrackingStore

    return TrackingStore().model_folder(model)


def build(stage: str, preset: str = "tiny", **settings: Any) -> Result:
    """Build a stage, or return its finished result from the store.

    Args:
        stage: ``projector``, ``evaluate``, ...
        preset: Name of a file in ``experiments/``, or a path.
        **settings: Settings to change, with two underscores in place of a dot: ``vision__pool=2``.
    """
    from mmphi.pipeline.build import Pipeline
    from mmphi.stages import STAGES, load_settings

    overrides = {name.replace("__", "."): str(value) for name, value in settings.items()}
    return Pipeline(STAGES).build(stage, load_settings(preset, overrides, stage))
