"""Images embedded per second: the ``embed`` stage beside a plain open_clip loop, decoding included."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmphi.data.digests import file_digest
from mmphi.data.feature_writer import FeatureWriter
from mmphi.data.features import FeatureStore
from mmphi.data.records import ImageRef
from mmphi.models.vision import Tower, load_tower
from mmphi.settings import VisionSettings
from mmphi.stages.embed import EmbedSettings, embed

CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": 6, "width": 192, "patch_size": 32, "head_width": 64},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


def draw_photos(folder: Path, count: int) -> list[ImageRef]:
    """JPEG files as large as photographs of the web are (500 x 375)."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    refs = []
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8))
        path = folder / f"{i:05d}.jpg"
        small.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
        refs.append(ImageRef(path.name, path))
    return refs


def plain(tower: Tower, images: Sequence[ImageRef]) -> torch.Tensor:
    """What a first script does: open, preprocess and encode one image after another, and keep all in memory."""
    features = []
    for image in images:
        pixels = tower.preprocess(Image.open(image.path).convert("RGB"))
        features.append(tower(pixels[None]))
    return torch.cat(features).half()


def staged(tower: Tower, images: Sequence[ImageRef], folder: Path, workers: int) -> None:
    """What the stage does, digests included."""
    chosen = EmbedSettings(workers=workers, batch_size=32)
    writer = FeatureWriter(folder, tower.tokens, tower.width, chosen.shard_images, tower.digest)
    embed([(file_digest(image.path), image.path) for image in images], tower, writer, chosen, lambda _: None)
    writer.finish()


def main(arguments: list[str]) -> int:
    """``mmphi benchmark embed``."""
    parser = argparse.ArgumentParser(prog="mmphi benchmark embed", description=__doc__)
    parser.add_argument("--images", type=int, default=256, help="images [256]")
    parser.add_argument("--model", default="", help="open_clip model [a small ViT with random weights]")
    parser.add_argument("--pretrained", default="", help="its pretrained tag or weights file")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode [2]")
    parser.add_argument("--rounds", type=int, default=3, help="how often both are measured, in turn [3]")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    rates: dict[str, list[float]] = {"plain loop": [], "mmphi": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "benchmark-vit.json"
        config.write_text(json.dumps(CONFIG))
        tower: Any = load_tower(
            VisionSettings(model=options.model or str(config), pretrained=options.pretrained or "random")
        )
        images = draw_photos(folder / "images", options.images)
        for number in range(options.rounds):
            begun = time.perf_counter()
            expected = plain(tower, images)
            rates["plain loop"].append(options.images / (time.perf_counter() - begun))
            begun = time.perf_counter()
            staged(tower, images, folder / str(number), options.workers)
            rates["mmphi"].append(options.images / (time.perf_counter() - begun))
            far = (FeatureStore(folder / str(number)).get(images).float() - expected.float()).abs().max().item()
    print(f"{options.images} JPEG images of 500 x 375, decoding included; largest difference of a feature: {far:.4f}")
    for name, features in rates.items():
        print(f"{name:<12}{sorted(features)[len(features) // 2]:>10.1f} images/s")
    ratios = [a / b for a, b in zip(rates["mmphi"], rates["plain loop"], strict=True)]
    print(f"mmphi over the plain loop: {', '.join(f'{r:.2f}' for r in ratios)}")
    if options.json:
        options.json.write_text(json.dumps({**rates, "largest_difference": [far]}, indent=1))
    return 0
