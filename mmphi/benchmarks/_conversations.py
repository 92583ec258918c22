"""Inputs of ``mmphi benchmark projector`` and ``qlora``: models with random weights, images and tokenized rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmphi.data.features import FeatureStore
    from mmphi.data.schema import ImageRef

FEATURES = "features"


@dataclass(frozen=True)
class Shape:
    """Sizes of the models and the batch.

    The answers of a row have ``shortest`` to ``longest`` words, evenly spaced on a log scale. ``recompute`` turns on
    gradient checkpointing for transformers' side: PEFT's page does so, and Phi-2's size does not fit without.
    ``quantised`` keeps the language model in NF4 in benchmarks that do not always do so.
    """

    width: int = 256
    layers: int = 4
    head: int = 32
    vision_width: int = 384
    vision_layers: int = 8
    image_size: int = 224
    patch_size: int = 16
    batch_size: int = 16
    images: int = 64
    shortest: int = 4
    longest: int = 120
    max_length: int = 2048
    precision: str = "fp32"
    recompute: bool = False
    quantised: bool = False


SHAPES = {
    "small": Shape(),
    "tiny": Shape(32, 2, 8, 32, 2, 64, 16, 4, 6, 2, 6, 256),
    "phi2": Shape(2560, 32, 80, 1024, 24, 336, 14, 16, 256, 10, 400, 2048, "bf16", True),
}


def prepare(folder: Path, shape: Shape, steps: int) -> None:
    """Write the inputs of all sides: models with random weights, images and rows."""
    import numpy as np
    import open_clip
    import torch
    from safetensors.torch import save_file
    from transformers import PhiForCausalLM

    from mmphi.benchmarks.embed import draw_photos
    from mmphi.data.features import LiveFeatures
    from mmphi.models.device import this_device
    from mmphi.models.export.llava_export import as_llava, save_llava
    from mmphi.models.language.phi import phi_config
    from mmphi.models.multimodal import Multimodal
    from mmphi.models.projector import Projector, ProjectorConfig
    from mmphi.models.vision.vision_encoder import VisionReference
    from mmphi.text.tokenized_example import SpanContent, join_spans
    from mmphi.text.tokenizer import phi2_tokenizer

    torch.manual_seed(0)
    tokenizer = phi2_tokenizer()
    heads = shape.width // shape.head
    config = phi_config(shape.layers, shape.width, heads, shape.max_length, 51200, tokenizer.eos_token_id)
    with this_device():
        language = PhiForCausalLM(config)
    if shape.precision == "bf16":
        language.to(torch.bfloat16)
    language.save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    vision = {"image_size": shape.image_size, "layers": shape.vision_layers, "width": shape.vision_width}
    vision |= {"patch_size": shape.patch_size, "head_width": min(64, shape.vision_width)}
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1}
    (folder / "benchmark-vit.json").write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder / "benchmark-vit.json")
    clip = open_clip.create_model("benchmark-vit")
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, folder / "vision.safetensors")
    Projector(ProjectorConfig(shape.vision_width, shape.width)).save(folder)

    images = draw_photos(folder / "images", shape.images)
    spoken, encoder = loaded_language(folder, shape.precision), loaded_tower(folder)
    store_features(folder, images)
    rng, rows = np.random.default_rng(0), []
    words = ["table", "people", "the", "red", "standing", "a", "near", "street", "of", "dog", "is", "two", "with"]
    spread = np.geomspace(shape.shortest, shape.longest, shape.batch_size).astype(int)
    for step in range(steps):
        batch = []
        for length in rng.permutation(spread):
            image = images[int(rng.integers(len(images)))]
            turns = [(" ".join(rng.choice(words, 8)), " ".join(rng.choice(words, max(1, length // 2)))) for _ in "ab"]
            parts = spoken.prompt.parts(turns, images=1)
            sample = join_spans(parts, [SpanContent("image", image, encoder.tokens)], str(step))
            batch.append(
                {
                    "ids": sample.input_ids.tolist(),
                    "supervised": sample.supervised.tolist(),
                    "image": [image.id, str(image.path)],
                    "image_at": [sample.spans[0].start, sample.spans[0].length],
                }
            )
        rows.append(batch)
    (folder / "rows.json").write_text(json.dumps(rows))
    settings = vision_settings(folder)
    model = Multimodal(
        spoken, Projector.load(folder), LiveFeatures(encoder), 2048, VisionReference(settings, encoder.digest)
    )
    save_llava(*as_llava(model), folder / "llava")


def store_features(folder: Path, images: Sequence[ImageRef]) -> None:
    """Compute the features of images and write them to disk, as the stage ``embed`` does."""
    from mmphi.benchmarks.embed import staged
    from mmphi.models.device import this_device

    staged(loaded_tower(folder).to(this_device()), images, folder / FEATURES, workers=0)


def step_flops(shape: Shape, rows: Sequence[Mapping[str, Any]]) -> float:
    """Floating-point operations that a step on some rows needs.

    Each frozen weight counts 4 per token, 2 forward and 2 for the gradient of its input; the head counts only at
    supervised tokens. Attention counts 12 per unit of width, layer and attended pair. Padding and recomputation are not
    counted.
    """
    tokens = sum(len(row["ids"]) for row in rows)
    pairs = sum(len(row["ids"]) * (len(row["ids"]) + 1) // 2 for row in rows)
    learned = sum(sum(row["supervised"]) for row in rows)
    weights = 4.0 * 12 * shape.layers * shape.width**2 * tokens + 4.0 * 51200 * shape.width * learned
    return weights + 12.0 * shape.layers * shape.width * pairs


def vision_settings(folder: Path) -> Any:
    """Settings of the vision encoder that :func:`prepare` wrote."""
    from mmphi.config import VisionSettings

    return VisionSettings(model=str(folder / "benchmark-vit.json"), pretrained=str(folder / "vision.safetensors"))


def loaded_tower(folder: Path) -> Any:
    """Load the vision encoder."""
    from mmphi.models.vision.vision_encoder import load_vision_encoder

    return load_vision_encoder(vision_settings(folder))


def loaded_language(folder: Path, precision: Any) -> Any:
    """Load the language model."""
    from mmphi.config import LanguageSettings
    from mmphi.models.device import this_device
    from mmphi.models.language.language_model import load_language_model

    settings = LanguageSettings(model=str(folder / "language"), precision=precision, prompt="phi")
    return load_language_model(settings, None, this_device())


def stored(folder: Path) -> FeatureStore:
    """Open the stored features of the images."""
    from mmphi.data.features import FeatureStore

    return FeatureStore(folder / FEATURES)
