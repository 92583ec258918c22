"""Estimates of what stages download, hash and embed, as far as known before the data is available."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from mmphi.config import DataSettings, LanguageSettings, SourceSettings, VisionSettings
from mmphi.config.declared_view import SettingsView
from mmphi.config.light_clip import LightClipSettings
from mmphi.config.shared import sources_of
from mmphi.stages.scenes import ScenesSettings

FEATURE_BYTES = 2  # fp16
# Images named by a file that may not be downloaded yet: Liu et al. (2023), section 3, "approximately 80K images".
KNOWN_IMAGES = {"llava_instruct_150k.json": 80_000}
KNOWN_FILES = {"llava_instruct_150k.json": 229e6}  # Bytes, from LLaVA's docs/Data.md.
KNOWN_PARAMETERS = {"microsoft/phi-2": 2_779_683_840}
STORED_BYTES = 2  # Per parameter, as hub models of this size are stored.


def image_count(settings: SettingsView) -> int:
    """Number of images in the data; sources whose images cannot be counted count as 0."""
    data, total = settings(DataSettings), 0
    for source in sources_of(data):
        count = _scenes(settings) if source.kind == "scenes" else _named(source)
        total += min(count, data.max_images) if data.max_images else count
    return total


def _scenes(settings: SettingsView) -> int:
    chosen = settings(ScenesSettings)
    return chosen.train_images + chosen.validation_images + chosen.test_images


def _named(source: SourceSettings) -> int:
    path = Path(source.path)
    if not path.is_file():
        return KNOWN_IMAGES.get(path.name, 0)
    try:
        if source.kind == "captions":
            with path.open(encoding="utf-8-sig", newline="") as file:
                return len({row.get(source.image_column) for row in csv.DictReader(file)})
        content = json.loads(path.read_bytes())
        rows = content.get("images", []) if isinstance(content, dict) else content
        names = (row.get("image") or row.get("filename") for row in rows if isinstance(row, dict))
        return len({str(name) for name in names if name})
    except (OSError, ValueError):
        return 0  # The stage that reads the file reports the error.


def feature_shape(settings: SettingsView) -> tuple[int, int]:
    """Features per image and their width; (0, 0) if only building the encoder would determine them."""
    vision = settings(VisionSettings)
    if vision.model != "light_clip":
        if vision.pretrained and (shape := vit_shape(vision)):
            return shape
        from mmphi.models.vision.vision_encoder import encoder_output_shape

        return encoder_output_shape(vision) if vision.pretrained else (0, 0)
    clip = settings(LightClipSettings)
    if clip.image_tower:
        return 0, 0
    if clip.from_nothing == "vit":
        return (clip.image_size // clip.patch_size // vision.pool) ** 2, clip.width
    stride, width = 32 >> (-vision.layer - 1), 8 * clip.width >> (-vision.layer - 1)
    return (clip.image_size // max(stride, 4) // vision.pool) ** 2, width


def vit_shape(vision: VisionSettings) -> tuple[int, int] | None:
    """Features per image and their width for a ViT of open_clip, from its configuration file.

    This avoids importing open_clip, which takes seconds. ``None`` if the file does not describe such a ViT.
    """
    package = importlib.util.find_spec("open_clip")
    for folder in (package.submodule_search_locations or ()) if package else ():
        try:
            config = json.loads((Path(folder) / "model_configs" / f"{vision.model}.json").read_bytes())["vision_cfg"]
            width, size, patch = int(config["width"]), int(config["image_size"]), int(config["patch_size"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if "timm_model_name" in config or size % patch or (size // patch) % vision.pool:
            return None
        return (size // patch // vision.pool) ** 2 + (vision.cls == "keep"), width
    return None


def feature_bytes(settings: SettingsView) -> int:
    """Bytes of the features of all images, stored in fp16."""
    tokens, width = feature_shape(settings)
    return image_count(settings) * tokens * width * FEATURE_BYTES


def to_hash(settings: SettingsView) -> Iterator[str]:
    """Yield the files and folders whose contents are part of cache keys; digests are cached by size and time."""
    from mmphi.data.readers import READERS

    for source in sources_of(settings(DataSettings)):
        yield from (path for path in (source.path, source.images) if path and READERS[source.kind].local)
    language = settings(LanguageSettings).model
    if language.startswith(("/", "$")):
        yield language


def to_fetch(settings: SettingsView) -> Iterator[str]:
    """Yield descriptions of the downloads that training a projector with these settings requires."""
    language, vision = settings(LanguageSettings), settings(VisionSettings)
    if "/" in language.model and not Path(language.model).exists() and not language.model.startswith("$"):
        parameters = KNOWN_PARAMETERS.get(language.model)
        size = f", {parameters * STORED_BYTES / 1e9:.1f} GB" if parameters else ""
        yield f"{language.model}{size}, from the hub"
    if (
        vision.model != "light_clip"
        and vision.pretrained not in ("", "random")
        and not Path(vision.pretrained).exists()
    ):
        yield f"{vision.model} {vision.pretrained}, by open_clip"
    for source in sources_of(settings(DataSettings)):
        path = Path(source.path)
        if source.kind == "llava" and path.name in KNOWN_FILES and not path.is_file():
            size = f"{KNOWN_FILES[path.name] / 1e6:.0f} MB and about {KNOWN_IMAGES[path.name]:,} images of COCO"
            yield f"{path.name}, {size}: `mmphi fetch llava FOLDER`"
