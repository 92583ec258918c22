"""Stage ``embed``: the features of every image, computed once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmphi.settings import Settings
from mmphi.stage import Context, Cost, Stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmphi.data.records import ImageRef


def upstream(settings: Settings) -> tuple[str, ...]:
    """Scenes where they are read, and the light CLIP where it is the tower."""
    scenes = ("scenes",) if settings.uses_scenes() else ()
    return (*scenes, "light_clip") if settings.vision.model == "light_clip" else scenes


def inputs(settings: Settings) -> dict[str, Path]:
    """Data files, and the tower's weights where they are a file."""
    files = {
        f"data.sources.{i}.path": Path(source.path)
        for i, source in enumerate(settings.data.sources)
        if source.path and source.kind != "datasets"
    }
    for name in ("model", "pretrained"):
        path = Path(getattr(settings.vision, name))
        if path.is_file():
            files[f"vision.{name}"] = path
    return files


def cost(settings: Settings) -> Cost:
    """Guessed from the drawn scenes alone; the stage itself counts its images before it starts."""
    chosen = settings.scenes
    images = chosen.train_images + chosen.validation_images + chosen.test_images if settings.uses_scenes() else 0
    side = settings.light_clip.image_size // settings.light_clip.patch_size // settings.vision.pool
    return Cost(images * side**2 * settings.light_clip.width * 2)


class Decoded:
    """A dataset of images as worker processes see them: digest and pixels, or the reason there are none."""

    def __init__(self, images: Sequence[ImageRef], preprocess: Callable[[Any], Any]) -> None:
        self.images, self.preprocess = images, preprocess

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[str, str, Any, str]:
        from mmphi.data.images import open_image
        from mmphi.errors import ImageError

        image = self.images[index]
        try:
            pixels = self.preprocess(open_image(image.path))
            return image.id, hashlib.sha256(image.path.read_bytes()).hexdigest(), pixels, ""
        except ImageError as error:
            return image.id, "", None, error.reason


def as_list(batch: list[Any]) -> list[Any]:
    """Keep a batch as it is."""
    return batch


def run(ctx: Context) -> Mapping[str, float]:
    """Compute what is not stored yet."""
    from mmphi.data.read import read_examples
    from mmphi.errors import DataError
    from mmphi.models.assemble import this_device
    from mmphi.models.vision import load_tower

    settings = ctx.settings
    scenes, light_clip = ctx.upstream.get("scenes"), ctx.upstream.get("light_clip")
    examples, _ = read_examples(settings, scenes.path if scenes else None)
    images = list({e.image.id: e.image for e in examples if e.image is not None}.values())
    if not images:
        raise DataError("there is no image to embed", "name a source with images in data.sources")
    tower = load_tower(settings.vision, light_clip.path if light_clip else None).to(this_device())
    metrics = embed(ctx, images, tower)
    bad = metrics["embed/unreadable"] / len(images)
    if bad > settings.data.max_bad_share:
        raise DataError(
            f"{bad:.1%} of the images cannot be read; at most {settings.data.max_bad_share:.1%} may be",
            "the run's table `unreadable` lists them; mend them, or raise data.max_bad_share",
        )
    return metrics


def embed(ctx: Context, images: Sequence[ImageRef], tower: Any) -> dict[str, float]:
    """Write the features of images to ``ctx.folder``, going on from what it holds."""
    from torch.utils.data import DataLoader
    from tqdm.auto import tqdm

    from mmphi.data.features import FeatureWriter

    chosen = ctx.settings.embed
    writer = FeatureWriter(ctx.folder, len(images), tower.tokens, tower.width, chosen.shard_images)
    size = writer.bytes_for(len(images)) / 1e9
    ctx.tracker.say(f"embed: {len(images)} images x {tower.tokens} tokens x {tower.width} fp16 = {size:.3f} GB")
    begun, before = time.perf_counter(), writer.seen
    todo: Any = Decoded(images[before:], tower.preprocess)
    loader = DataLoader(todo, chosen.batch_size, num_workers=chosen.workers, collate_fn=as_list)
    with tqdm(total=len(images), initial=before, desc="embed", unit="image") as bar:
        for batch in loader:
            _embed_batch(batch, writer, tower)
            bar.update(len(batch))
    seconds = time.perf_counter() - begun
    writer.finish()
    if writer.unreadable:
        ctx.tracker.table("unreadable", [{"image": i, "reason": why} for i, why in writer.unreadable.items()])
        ctx.tracker.say(f"embed: {len(writer.unreadable)} images cannot be read and are left out")
    return {
        "embed/images": len(writer.rows),
        "embed/duplicates": len(writer.rows) - len(writer.digests),
        "embed/unreadable": len(writer.unreadable),
        "embed/bytes": writer.bytes_for(writer.written),
        "embed/images_per_s": (len(images) - before) / seconds,
    }


def _embed_batch(batch: list[tuple[str, str, Any, str]], writer: Any, tower: Any) -> None:
    import torch

    from mmphi.errors import ModelError

    good = [(image_id, digest) for image_id, digest, _, reason in batch if not reason]
    fresh = {digest: pixels for _, digest, pixels, reason in batch if not reason and digest not in writer.digests}
    features: dict[str, Any] = {}
    if fresh:
        computed = tower(torch.stack(list(fresh.values()))).half().cpu()
        if not computed.isfinite().all():
            raise ModelError("the tower's features do not fit in fp16", "use another vision.layer or model")
        features = dict(zip(fresh, computed, strict=True))
    writer.write(good, features, [(image_id, reason) for image_id, _, _, reason in batch if reason])


STAGE = Stage(
    name="embed",
    version=1,
    help="compute the features of every image once, and store them",
    sections=("embed", "vision", "data"),
    run=run,
    upstream=upstream,
    inputs=inputs,
    cost=cost,
)
