"""Images embedded per second by the ``embed`` stage and by open_clip, decoding included, and by the encoder alone.

Both sides use the same encoder, batch size and number of loader workers. open_clip's side uses open_clip's
preprocessing and keeps the features in memory; the stage's side also computes the digest of each file, validates the
decoded image and writes the features to disk.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch.utils.data import DataLoader

from mmphi.config import VisionSettings
from mmphi.data.content_hash import file_digest
from mmphi.data.feature_writer import FeatureWriter
from mmphi.data.features import FeatureStore
from mmphi.data.schema import ImageRef
from mmphi.models.device import this_device
from mmphi.models.vision.vision_encoder import VisionEncoder, load_vision_encoder
from mmphi.stages.embed import EmbedSettings, embed

CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": 6, "width": 192, "patch_size": 32, "head_width": 64},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


def draw_photos(folder: Path, count: int) -> list[ImageRef]:
    """Write random JPEG files of a size that is typical of photos on the web, 500 x 375 pixels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    refs = []
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8))
        path = folder / f"{i:05d}.jpg"
        small.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
        refs.append(ImageRef(path.name, path))
    return refs


class Opened:
    """Dataset of opened, converted and preprocessed images, as in a script for open_clip."""

    def __init__(self, images: Sequence[ImageRef], preprocess: Callable[[Image.Image], torch.Tensor]) -> None:
        self.images, self.preprocess = images, preprocess

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.preprocess(Image.open(self.images[index].path).convert("RGB"))


def usual(encoder: VisionEncoder, images: Sequence[ImageRef], batch_size: int, workers: int) -> torch.Tensor:
    """Features of images, with open_clip's preprocessing in a loader's workers; shape (N, tokens, width), fp16."""
    preprocess = image_transform_v2(PreprocessCfg(**encoder.visual.preprocess_cfg), is_train=False)
    opened: Any = Opened(images, preprocess)
    loader = DataLoader(opened, batch_size, num_workers=workers, pin_memory=torch.cuda.is_available())
    return torch.cat([encoder(pixels).half().cpu() for pixels in loader])


def alone(encoder: VisionEncoder, images: int, batch_size: int) -> float:
    """Images per second of the encoder alone, on preprocessed pixels."""
    size = encoder.preprocess(Image.new("RGB", (8, 8))).shape
    pixels = torch.randn(batch_size, *size).to(next(encoder.parameters()).device)
    encoder(pixels).sum().item()
    begun, seen = time.perf_counter(), 0
    while seen < images:
        encoder(pixels).sum().item()
        seen += batch_size
    return seen / (time.perf_counter() - begun)


def staged(
    encoder: VisionEncoder, images: Sequence[ImageRef], folder: Path, workers: int, batch_size: int = 32
) -> None:
    """Embed images as the stage does, digests included, and write the features to a folder."""
    chosen = EmbedSettings(workers=workers, batch_size=batch_size)
    writer = FeatureWriter(folder, encoder.tokens, encoder.width, chosen.shard_images, encoder.digest)
    embed([(file_digest(image.path), image.path) for image in images], encoder, writer, chosen, lambda _: None)
    writer.finish()


def main(arguments: list[str]) -> int:
    """Run ``mmphi benchmark embed``."""
    parser = argparse.ArgumentParser(prog="mmphi benchmark embed", description=__doc__)
    parser.add_argument("--images", type=int, default=256, help="images [256]")
    parser.add_argument("--model", default="", help="open_clip model [a small ViT with random weights]")
    parser.add_argument("--pretrained", default="", help="its pretrained tag or weights file")
    parser.add_argument("--batch-size", type=int, default=32, help="images a batch [32]")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode, on each side [2]")
    parser.add_argument("--rounds", type=int, default=3, help="how often all are measured, in turn [3]")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    rates: dict[str, list[float]] = {"encoder only": [], "open_clip": [], "mmphi": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "benchmark-vit.json"
        config.write_text(json.dumps(CONFIG))
        settings = VisionSettings(model=options.model or str(config), pretrained=options.pretrained or "random")
        encoder: Any = load_vision_encoder(settings).to(this_device())
        images = draw_photos(folder / "images", options.images)
        for number in range(options.rounds):
            rates["encoder only"].append(alone(encoder, options.images, options.batch_size))
            begun = time.perf_counter()
            expected = usual(encoder, images, options.batch_size, options.workers)
            rates["open_clip"].append(options.images / (time.perf_counter() - begun))
            begun = time.perf_counter()
            staged(encoder, images, folder / str(number), options.workers, options.batch_size)
            rates["mmphi"].append(options.images / (time.perf_counter() - begun))
            far = (FeatureStore(folder / str(number)).get(images).float() - expected.float()).abs().max().item()
    print(f"{options.images} JPEG images of 500 x 375, decoding included; largest difference of a feature: {far:.4f}")
    for side, found in rates.items():
        print(f"{side:<12}{sorted(found)[len(found) // 2]:>10.1f} images/s")
    ratios = [a / b for a, b in zip(rates["mmphi"], rates["open_clip"], strict=True)]
    print(f"mmphi over open_clip: {', '.join(f'{r:.2f}' for r in ratios)}")
    if options.json:
        options.json.write_text(json.dumps({**rates, "largest_difference": [far]}, indent=1))
    return 0
