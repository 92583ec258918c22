"""Light CLIP: a small CLIP of random or pretrained encoders, in open_clip's format."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import open_clip
from open_clip.transform import PreprocessCfg
from safetensors.torch import load_file, save_file

from mmphi.errors import ModelError
from mmphi.models.loading_bar import no_loading_bar
from mmphi.models.vision.vision_encoder import open_clip_warnings

HEAD_WIDTH = 32
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "merges.txt"}


@dataclass(frozen=True)
class ClipShape:
    """Shape of a light CLIP.

    Attributes:
        image_tower: timm model name; empty builds a vision encoder with random weights.
        from_nothing: Kind of a vision encoder with random weights.
        image_weights: safetensors file of the vision encoder's weights.
        text_tower: Hugging Face folder of the text encoder; empty builds a small transformer with random weights.
        image_size: Side of the input image, in pixels.
        patch_size: Side of a patch (ViT), in pixels.
        width: Width of encoders with random weights; a ResNet begins at a quarter of it.
        layers: Layers of encoders with random weights; a ResNet has one block per stage.
        embed_dim: Width of the shared space.
        context_length: Tokens of the longest caption, for a text encoder with random weights.
    """

    image_tower: str = ""
    from_nothing: Literal["resnet", "vit"] = "resnet"
    image_weights: str = ""
    text_tower: str = ""
    image_size: int = 64
    patch_size: int = 8
    width: int = 128
    layers: int = 4
    embed_dim: int = 128
    context_length: int = 32


def model_config(chosen: ClipShape, text_tower: Path | None) -> dict[str, Any]:
    """open_clip's configuration of a light CLIP.

    Args:
        chosen: Shape of the model.
        text_tower: Folder of the Hugging Face text encoder, as written to the configuration.
    """
    heads = max(1, chosen.width // HEAD_WIDTH)
    vision: dict[str, Any] = {"image_size": chosen.image_size}
    if chosen.image_tower:
        vision |= {"timm_model_name": chosen.image_tower, "timm_pool": "avg", "timm_proj": "linear"}
        vision |= {"timm_model_pretrained": False}
    elif chosen.from_nothing == "vit":
        # Average pooling instead of a CLS token: every patch token has to carry information for a projector.
        vision |= {"layers": chosen.layers, "width": chosen.width, "patch_size": chosen.patch_size}
        vision |= {"head_width": chosen.width // heads, "pool_type": "avg"}
    else:
        # CLIP's ResNet, one block per stage: it learns shapes from few images much sooner than a ViT.
        vision |= {"layers": [1, 1, 1, 1], "width": chosen.width // 4}
    text: dict[str, Any]
    if text_tower is not None:
        text = {"hf_model_name": str(text_tower), "hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}
        text |= {"hf_tokenizer_name": str(text_tower.parent), "hf_model_pretrained": False, "context_length": 64}
    else:
        text = {"context_length": chosen.context_length, "vocab_size": 49408, "width": chosen.width, "heads": heads}
        text |= {"layers": chosen.layers}
    return {"embed_dim": chosen.embed_dim, "vision_cfg": vision, "text_cfg": text}


def build(chosen: ClipShape, folder: Path) -> tuple[Any, Any]:
    """Build the model and its tokenizer, with pretrained encoders if the shape names them.

    Args:
        chosen: Shape of the model.
        folder: Folder for the model. The configuration and the text encoder's configuration and tokenizer are written
            immediately.

    Raises:
        ModelError: If an encoder or its weights cannot be loaded.
    """
    text_tower = _copy_text_tower(Path(chosen.text_tower), folder) if chosen.text_tower else None
    config = model_config(chosen, text_tower)
    preprocess: dict[str, Any] = {"size": chosen.image_size}
    try:
        _write_config(folder, config, preprocess)
        model = _create(folder)
        if chosen.image_tower:
            # Scale inputs as in the pretraining of the vision encoder.
            scaling = model.visual.trunk.default_cfg
            preprocess |= {"mean": scaling["mean"], "std": scaling["std"], "interpolation": scaling["interpolation"]}
            _write_config(folder, config, preprocess)
            model = _create(folder)
        if chosen.image_weights:
            wanted = model.visual.trunk.state_dict()
            weights = {k: v for k, v in load_file(chosen.image_weights).items() if k in wanted}
            missing = sorted(wanted.keys() - weights.keys())
            if missing:
                raise ModelError(f"{chosen.image_weights} lacks {missing[0]}", f"it must fit {chosen.image_tower}")
            model.visual.trunk.load_state_dict(weights)
        if chosen.text_tower:
            from transformers import AutoModel

            with no_loading_bar(chosen.text_tower):
                pretrained = AutoModel.from_pretrained(chosen.text_tower, add_pooling_layer=False)
            model.text.transformer.load_state_dict(pretrained.state_dict(), strict=False)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"the light CLIP cannot be built: {error}", "check light_clip.image_tower and text_tower"
        ) from error
    return model, open_clip.get_tokenizer(f"local-dir:{folder}")


def _create(folder: Path) -> Any:
    with open_clip_warnings():
        return open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)


def _copy_text_tower(source: Path, folder: Path) -> Path:
    if not (source / "config.json").is_file():
        raise ModelError(f"light_clip.text_tower = {source} holds no config.json", "give a Hugging Face model's folder")
    target = folder.resolve() / "text_tower"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "config.json", target)
    # open_clip's get_tokenizer expects the tokenizer's files in the folder of the model's configuration.
    for path in source.glob("*"):
        if path.name in TOKENIZER_FILES:
            shutil.copy(path, folder)
    return target


def _write_config(folder: Path, model_cfg: dict[str, Any], preprocess: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    preprocess_cfg = {k: v for k, v in vars(PreprocessCfg(**preprocess)).items() if k != "size"}
    content = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2) + "\n")


def save(model: Any, folder: Path) -> None:
    """Write the weights next to the configuration, for ``open_clip.create_model("local-dir:FOLDER")``."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    part = folder / "weights.part"
    save_file(weights, part)
    part.rename(folder / "open_clip_model.safetensors")
