"""mmphi makes a causal language model read images and audio, one tracked experiment at a time.

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

__version__ = "0.1.0"
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
    """A trained model with all that it is joined from; models of one process share what they have in common.

    Args:
        model: Folder, id of a run, or registered model (``models:/NAME/VERSION``) of a stage that ends in a model.
        device: Where it goes, ``cpu`` or ``cuda:0``; this process's accelerator where left out, else the CPU.
        language: Folder or hub name of its language model, where that has moved.
        precision: ``fp32``, ``bf16``, ``8bit`` or ``4bit`` for the language model; as it was trained where left out.
        whisper: Size or file of the Whisper that it hears with; the one it was trained with, else tiny.en, where left
            out. It is loaded at the first recording.
        vision: The vision encoder, where :func:`join` was given a module.
        preprocess: Its preprocessing.

    Raises:
        ModelError: If a part cannot be had, or is not what it was.
        StoreError: If there is no such run or registered model.
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
    parts = {"language": language, "precision": precision, "whisper": whisper}
    return load_model(folder, vision=vision, preprocess=preprocess, device=place, **parts, once=PROCESS.once)


def _folder_of(model: str) -> Path:
    """The files of a run or registered model; those of a run in a local SQLite store are found without mlflow."""
    from mmphi.tracking.status_reader import status_reader

    found = status_reader().folder(model.removeprefix("runs:/").partition("/")[0])
    if found is not None:
        return found
    from mmphi.tracking.run_writer import TrackingStore

    return TrackingStore().model_folder(model)


def build(stage: str, preset: str = "tiny", **settings: Any) -> Result:
    """Build a stage, or take its finished result from the store.

    Args:
        stage: ``projector``, ``evaluate``, ...
        preset: Name of a file in ``experiments/``, or a path.
        **settings: Settings to change; a dot is written as two underscores: ``vision__pool=2``.
    """
    from mmphi.pipeline.build import Pipeline
    from mmphi.stages import STAGES, load_settings

    overrides = {name.replace("__", "."): str(value) for name, value in settings.items()}
    return Pipeline(STAGES).build(stage, load_settings(preset, overrides, stage))
