"""Checkpoints: model folders that load without data, pipeline or tracking store.

``mmphi.json`` lists the parts of the model: the language model by name and revision or digest, or, if it was trained
here, by its files in ``language/``; the vision encoder by name, tag and digest, or by its files in ``vision/``; the
prompt style; and the longest sequence. The folder also has the projector's files and the model card, ``README.md``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError

from mmphi.config.audio import AudioSettings
from mmphi.config.shared import LanguageSettings, VisionSettings
from mmphi.data.clip_weights import AUTO
from mmphi.data.features import ImageFeatures, LiveFeatures
from mmphi.errors import ModelError
from mmphi.models.audio.audio_features import AudioFeatureSource, audio_feature_source
from mmphi.models.audio.audio_projector import SHAPE, WEIGHTS, AudioProjector
from mmphi.models.audio.transcriber import Audio
from mmphi.models.device import this_device
from mmphi.models.language.adapter import ADAPTER, adapter_digest, load_adapter, save_adapter
from mmphi.models.language.language_model import (
    IN_MEMORY,
    PRETRAIN,
    STYLE_FILE,
    LanguageModel,
    language_model_digest,
    load_language_model,
    save_language_model,
)
from mmphi.models.multimodal import Multimodal
from mmphi.models.projector import Projector
from mmphi.models.vision.vision_encoder import LIGHT_CLIP, VisionEncoder, VisionReference, load_vision_encoder

T = TypeVar("T")
M = TypeVar("M", bound=Multimodal)
Once = Callable[[str, str, Callable[[], T]], T]
BUNDLE, LANGUAGE, VISION = "mmphi.json", "language", "vision"
FORMATS = (1, 2)  # 2: the vision encoder was passed as a module, and has to be passed again.
CLIP_FILES = ("*.json", "*.safetensors", "*.txt", "text_tower/*")


def load_without_cache(_kind: str, _digest: str, make: Callable[[], T]) -> T:
    """Load without sharing; for the place of :meth:`ProcessCache.once`."""
    return make()


def save_checkpoint(folder: Path, model: Multimodal) -> None:
    """Write a model to a folder for :func:`load_checkpoint`.

    Args:
        folder: Target folder.
        model: Model to save. The files of a language model that was trained here are linked or copied.

    Raises:
        ModelError: If the model could not be loaded again, for instance because its vision encoder is not known.
    """
    language, vision = model.language, model.vision
    _check_can_be_loaded(model)
    folder.mkdir(parents=True, exist_ok=True)
    chosen, digest = language.settings.model_dump() | {"prompt": language.prompt.style}, language.digest
    if digest == IN_MEMORY or (model.own_language and not language.local):  # Or its folder is missing.
        save_language_model(language.model, language.prompt, folder / LANGUAGE)
        digest = language_model_digest(str(folder / LANGUAGE), "")
        chosen |= {"model": LANGUAGE, "tokenizer": "", "revision": ""}
    elif model.own_language and language.local:
        if language.local != folder / LANGUAGE:
            _take(language.local, folder / LANGUAGE, ("*",))
        chosen |= {"model": LANGUAGE, "tokenizer": "", "revision": ""}
    content: dict[str, Any] = {"format": 2 if vision and vision.encoder else 1, "max_length": model.max_length}
    content["language"] = {**chosen, "digest": digest}
    if language.adapter is not None:
        save_adapter(language, folder / ADAPTER)
        content["adapter"] = adapter_digest(folder / ADAPTER)
    if vision is not None:
        if vision.folder is not None:
            _take(vision.folder, folder / VISION, CLIP_FILES)
        chosen = vision.settings.model_dump()
        # Settings at their automatic defaults are not written, because earlier versions do not know them.
        stated = {name: value for name, value in chosen.items() if name not in AUTO or value != AUTO[name]}
        content["vision"] = {**stated, "digest": vision.digest}
        if vision.encoder:
            own = {"encoder": vision.encoder, "fingerprint": list(vision.fingerprint)}
            content["vision"] = {**own, "digest": vision.digest}
        if vision.question:
            content["vision"]["question"] = vision.question
    if model.questions:
        content["questions"] = list(model.questions)
    if model.projector is not None:
        model.projector.save(folder)
    if model.speech is not None and model.audio is not None:
        model.speech.save(folder)
        content["audio"] = {**model.audio.settings.model_dump(), "digest": model.audio.digest}
    (folder / BUNDLE).write_text(json.dumps(content, indent=2) + "\n")


def _check_can_be_loaded(model: Multimodal) -> None:
    """Check that a model could be loaded again, before anything is written.

    Raises:
        ModelError: With the part that prevents it.
    """
    language, vision = model.language, model.vision
    if model.projector is not None:
        if vision is None:
            raise ModelError("the vision encoder of the model is not known", "pass vision to Multimodal")
        if not model.projector.saveable:
            raise ModelError(
                "a custom projector cannot be saved",
                "save its state_dict, and pass the projector again when you build the model",
            )
        if vision.encoder and not vision.fingerprint:
            raise ModelError(
                "the model uses stored features, which cannot be saved with it",
                "build it with the encoder of the features",
            )
    unsaved = language.digest == IN_MEMORY or (model.own_language and not language.local)
    if unsaved and language.settings.precision in ("4bit", "8bit"):
        raise ModelError(
            f"the language model {language.name} is quantised, and the folder of its weights does not exist",
            "load it from the folder with its weights",
        )


def _take(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    """Hard-link files, or copy them where that is not possible."""
    for path in sorted({p for pattern in patterns for p in source.glob(pattern) if p.is_file()}):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        try:
            os.link(path, place)
        except OSError:
            shutil.copy2(path, place)


def read_description(folder: Path) -> dict[str, Any]:
    """Content of a checkpoint's ``mmphi.json``.

    Raises:
        ModelError: If the folder is not a checkpoint, or has an unknown format.
    """
    try:
        content = dict(json.loads((folder / BUNDLE).read_text()))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder} is not a model folder: {error}",
            "pass the folder or run of a stage that writes models, such as projector",
        ) from error
    if content.get("format") not in FORMATS:
        known = " or ".join(map(str, FORMATS))
        raise ModelError(f"{folder / BUNDLE} has format {content.get('format')}, not {known}", "update mmphi")
    return content


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 of a checkpoint's ``mmphi.json`` and projectors, which identifies the model.

    Raises:
        ModelError: If the folder is not a checkpoint.
    """
    digest = hashlib.sha256(json.dumps(read_description(folder), sort_keys=True).encode())
    for name in ("projector.json", "projector.safetensors", SHAPE, WEIGHTS):
        if (folder / name).exists():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def load_checkpoint(
    folder: Path,
    *,
    device: torch.device | None = None,
    language: str = "",
    precision: str = "",
    features: ImageFeatures | None = None,
    whisper: str = "",
    audio_source: AudioFeatureSource | None = None,
    once: Once[Any] = load_without_cache,
    kind: type[M] | None = None,
) -> M | Multimodal:
    """Load a model with all of its parts.

    Args:
        folder: Folder written by :func:`save_checkpoint`.
        device: Device of the model; default :func:`~mmphi.models.device.this_device`.
        language: Folder or hub name of the language model, if it has moved.
        precision: Precision of the language model, if not the saved one.
        features: Source of image features; by default the vision encoder is loaded.
        whisper: Size or file of the Whisper, if it has moved or is not the saved one.
        audio_source: Source of audio features; by default a Whisper is loaded at the first recording.
        once: ``ProcessCache.once``, to share parts within this process; by default nothing is shared.
        kind: Class of the model; :class:`Multimodal` by default.

    Raises:
        ModelError: If a part cannot be loaded, or is not the saved one.
    """
    content, device = read_description(folder), device or this_device()
    spoken = _language(content, folder, device, language, precision, once)
    seen = features
    if seen is None and "vision" in content:
        seen = LiveFeatures(_tower(_vision(content["vision"], folder), device, once))
    projector = Projector.load(folder) if (folder / "projector.json").exists() else None
    vision = _vision(content["vision"], folder) if "vision" in content else None
    own = content["language"]["model"] == LANGUAGE and not language
    saved = dict(content.get("audio", {}))
    digest = saved.pop("digest", "")
    audio = Audio(AudioSettings(**saved | ({"whisper": whisper} if whisper else {})), digest)
    speech = AudioProjector.load(folder) if "audio" in content else None
    config = speech.config if speech else None
    make_audio_source = audio_source or (lambda: audio_feature_source(spoken, audio, config, device, once))
    questions = content.get("questions", ())  # Missing in models of earlier versions.
    return (kind or Multimodal)(
        spoken, projector, seen, content["max_length"], vision, own, make_audio_source, speech, audio, questions
    )


def _language(
    content: dict[str, Any], folder: Path, device: torch.device, moved: str, precision: str, once: Once[Any]
) -> LanguageModel:
    chosen = dict(content["language"])
    digest = chosen.pop("digest")
    own = chosen["model"] == LANGUAGE
    if own:
        chosen["model"] = str(folder / LANGUAGE)
    if moved:
        chosen |= {"model": moved, "tokenizer": "" if chosen["tokenizer"] != "phi-2" else "phi-2"}
    if precision:
        chosen["precision"] = precision
    try:
        settings = LanguageSettings(**chosen)
    except ValidationError as error:
        raise ModelError(f"{folder / BUNDLE}: {error.errors()[0]['msg']}", "restore the file that was saved") from error
    if "adapter" not in content:
        return get_shared_language_model(settings, None, device, once, digest, str(folder))
    found = adapter_digest(folder / ADAPTER)
    if found != content["adapter"]:
        raise ModelError(f"the adapter in {folder} was changed after it was saved", "fetch or train it again")

    def load() -> LanguageModel:
        # PEFT wraps layers in place, so the language model must not be shared.
        return load_adapter(
            get_shared_language_model(settings, None, device, load_without_cache, digest, str(folder)), folder / ADAPTER
        )

    language: LanguageModel = once("language", "/".join([digest, found, settings.precision, str(device)]), load)
    return language


def get_shared_language_model(
    settings: LanguageSettings,
    pretrained: Path | None,
    device: torch.device,
    once: Once[Any],
    expected: str = "",
    whose: str = "",
) -> LanguageModel:
    """Language model, shared within this process.

    Args:
        settings: The ``language`` section.
        pretrained: Folder of the ``pretrain`` stage, if the settings name it.
        device: Device of the model.
        once: ``ProcessCache.once``.
        expected: Expected digest; empty accepts any.
        whose: Name of the model that expects it, for messages.

    Raises:
        ModelError: If the language model is missing or has another digest.
    """
    name = str(pretrained / LANGUAGE) if settings.model == PRETRAIN and pretrained else settings.model
    path = Path(name)
    if expected.startswith("sha256:") and not path.exists():
        raise ModelError(
            f"the language model of {whose} was in {name}, which does not exist",
            "pass its new path: mmphi.load(..., language=FOLDER)",
        )
    digest = language_model_digest(name, settings.revision)
    if expected and digest != expected:
        raise ModelError(
            f"{name} is not the language model that {whose} was trained with",
            f"its digest is {digest[:23]}..., not {expected[:23]}...",
        )
    style = (path / STYLE_FILE).read_text() if (path / STYLE_FILE).is_file() else ""
    identity = "/".join([digest, settings.precision, settings.tokenizer, settings.prompt, style, str(device)])
    language: LanguageModel = once("language", identity, lambda: load_language_model(settings, pretrained, device))
    return language


def _vision(saved: dict[str, Any], folder: Path) -> VisionReference:
    own = {"digest", "question", "encoder", "fingerprint"}
    settings = VisionSettings(**{name: value for name, value in saved.items() if name not in own})
    light_clip = folder / VISION if settings.model == LIGHT_CLIP else None
    encoder, fingerprint = saved.get("encoder", ""), tuple(saved.get("fingerprint", ()))
    return VisionReference(settings, saved["digest"], light_clip, saved.get("question", ""), encoder, fingerprint)


def _tower(vision: VisionReference, device: torch.device, once: Once[Any]) -> VisionEncoder:
    """Vision encoder that a model was trained with.

    Earlier versions used OpenAI's preprocessing for every weights file; their models keep it.

    Raises:
        ModelError: If the encoder was passed as a module, or its digest differs.
    """
    if vision.encoder:
        raise ModelError(
            f"the model was trained with an encoder that was passed as a module, {vision.encoder}",
            "pass it again: mmphi.load(FOLDER, vision=encoder, preprocess=function)",
        )

    def earlier() -> VisionEncoder:
        return load_vision_encoder(vision.settings, vision.folder, earlier=True).to(device)

    try:
        encoder = get_shared_vision_encoder(vision.settings, vision.folder, device, once, vision.digest)
    except ModelError:  # Also where the weights' own preprocessing is not known.
        encoder = earlier()
    if encoder.digest != vision.digest:
        encoder = earlier()
    if encoder.digest != vision.digest:
        name = f"{vision.settings.model} {vision.settings.pretrained}".strip()
        raise ModelError(
            f"the vision encoder {name} is not the one that the model was trained with",
            "fetch the weights again, or install the version of open_clip that it was trained with",
        )
    return encoder


def get_shared_vision_encoder(
    settings: VisionSettings, light_clip: Path | None, device: torch.device, once: Once[Any], identity: str
) -> VisionEncoder:
    """Vision encoder, shared within this process.

    Args:
        settings: The ``vision`` section.
        light_clip: Folder of the light CLIP, if the settings name it.
        device: Device of the encoder.
        once: ``ProcessCache.once``.
        identity: Key of the encoder in the process cache.
    """
    encoder: VisionEncoder = once(
        "tower", f"{identity}/{device}", lambda: load_vision_encoder(settings, light_clip).to(device)
    )
    return encoder
