"""Stage ``embed``: computes the features of every image once and stores them.

The key depends only on the encoder, not on the images. If a result lacks requested images, the next run takes its
features over and computes the missing ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmphi.config import DataSettings, Section, VisionSettings, setting
from mmphi.config.declared_view import SettingsView
from mmphi.pipeline.stage import Context, Cost, Result, Stage
from mmphi.stages.estimates import feature_bytes
from mmphi.stages.shared_models import read, scenes_if_read, vision_encoder_of

if TYPE_CHECKING:
    from mmphi.data.feature_writer import FeatureWriter
    from mmphi.models.vision.image_features import Embedded
    from mmphi.models.vision.vision_encoder import VisionEncoder


class EmbedSettings(Section):
    """Image features computed once and stored."""

    batch_size: int = setting(64, "images per forward pass", unit="images", affects_key=False, ge=1)
    workers: int = setting(2, "processes that decode images", unit="processes", affects_key=False, ge=0)
    shard_images: int = setting(4096, "images per file", unit="images", affects_key=False, ge=1)
    ray: str = setting(
        "", "Ray cluster that computes: HOST:PORT, auto or local; empty: this machine", affects_key=False
    )


def upstream(settings: SettingsView) -> tuple[str, ...]:
    """``light_clip`` if it is the vision encoder."""
    return ("light_clip",) if settings(VisionSettings).model == "light_clip" else ()


def contents(settings: SettingsView, upstream: Mapping[str, Result]) -> dict[str, Path]:
    """Maps the digest of every image, and the name of each augmented view of training images, to an image file."""
    from mmphi.config.projector import ProjectorSettings
    from mmphi.data.augmentation import augmented_name
    from mmphi.data.content_hash import Digests
    from mmphi.data.dataset_builder import images_of

    examples, _ = read(settings, upstream)
    paths = [image.path for image in images_of(examples)]
    digests = Digests().of_files(paths, "image digests")
    found = {digest: path for path, digest in digests.items()}
    for image in images_of([e for e in examples if e.split == "train"]):
        for view in range(1, settings(ProjectorSettings).num_augmentations):
            found[augmented_name(digests[image.path], view)] = image.path
    return found


def covers(settings: SettingsView, upstream: Mapping[str, Result], folder: Path) -> bool:
    """Whether the stored features cover every image in the data."""
    from mmphi.data.features import FeatureStore

    store = FeatureStore(folder)
    return all(store.knows(digest) for digest in contents(settings, upstream))


def cost(settings: SettingsView) -> Cost:
    """Disk space of the features of all images that can be counted; the stage itself counts all of them."""
    from mmphi.config.projector import ProjectorSettings

    return Cost(feature_bytes(settings) * settings(ProjectorSettings).num_augmentations)


class DecodedImages:
    """Map-style dataset for worker processes: (digest, pixels, error reason) per image.

    Args:
        images: Digest and file of each image.
        preprocess: Maps a PIL image to the encoder's input tensor.
    """

    def __init__(self, images: Sequence[tuple[str, Path]], preprocess: Callable[[Any], Any]) -> None:
        self.images, self.preprocess = images, preprocess

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[str, Any, str]:
        from mmphi.data.augmentation import augmented_image
        from mmphi.data.images import open_image
        from mmphi.errors import ImageError

        digest, path = self.images[index]
        try:
            return digest, self.preprocess(augmented_image(open_image(path), digest)), ""
        except ImageError as error:
            return digest, None, error.reason


def stacked(batch: list[tuple[str, Any, str]]) -> tuple[list[str], Any, dict[str, str]]:
    """Collate: digests and pixels (B, 3, H, W) of readable images, ``None`` if B is 0, and reasons of the others."""
    from torch.utils.data import default_collate

    read = [(digest, pixels) for digest, pixels, reason in batch if not reason]
    unread = {digest: reason for digest, _, reason in batch if reason}
    # In a worker, default_collate stacks into shared memory, which avoids a copy to the main process.
    return [digest for digest, _ in read], default_collate([pixels for _, pixels in read]) if read else None, unread


def run(ctx: Context) -> Mapping[str, float]:
    """Compute and store the features of images that are not stored yet."""
    from mmphi.data.feature_writer import FeatureWriter
    from mmphi.errors import DataError

    wanted = contents(ctx.settings, ctx.upstream)
    if not wanted:
        raise DataError("the data has no images", "add a source with images to data.sources")
    encoder = vision_encoder_of(ctx)
    writer = FeatureWriter(
        ctx.folder, encoder.tokens, encoder.width, ctx.settings(EmbedSettings).shard_images, encoder.digest
    )
    taken = sum(writer.take_over(earlier.path) for earlier in ctx.earlier)
    if taken:
        ctx.tracker.say(f"embed: reusing the features of {taken} images from earlier runs")
    missing = [(digest, path) for digest, path in wanted.items() if not writer.knows(digest)]
    seconds = embed(missing, encoder, writer, ctx.settings(EmbedSettings), ctx.tracker.say)
    writer.finish()
    unreadable = {digest: why for digest, why in writer.unreadable.items() if digest in wanted}
    if unreadable:
        ctx.tracker.table("unreadable", [{"image": str(wanted[i]), "reason": why} for i, why in unreadable.items()])
        ctx.tracker.say(f"embed: {len(unreadable)} images cannot be read and are left out")
    bad, allowed = len(unreadable) / len(wanted), ctx.settings(DataSettings).max_bad_share
    if bad > allowed:
        raise DataError(
            f"{bad:.1%} of the images cannot be read; the limit is {allowed:.1%}",
            "the run's table `unreadable` lists them; fix them, or raise data.max_bad_share",
        )
    return {
        "embed/images": len(writer.places),
        "embed/computed": len(missing),
        "embed/unreadable": len(unreadable),
        "embed/bytes": writer.bytes_for(len(writer.places)),
        "embed/images_per_s": len(missing) / seconds,
    }


def embed(
    images: Sequence[tuple[str, Path]],
    encoder: VisionEncoder,
    writer: FeatureWriter,
    chosen: EmbedSettings,
    say: Callable[[str], None],
) -> float:
    """Compute and write the features of images.

    Args:
        images: Digest and file of each image.
        encoder: Vision encoder.
        writer: Writer of the features.
        chosen: Batch size, decoding workers and Ray cluster.
        say: Called with messages, such as the size of the features.

    Returns:
        Elapsed time in seconds.
    """
    from tqdm.auto import tqdm

    writer.reserve(len(images))
    size = writer.bytes_for(len(images)) / 1e9
    say(f"embed: {len(images)} images x {encoder.tokens} tokens x {encoder.width} fp16 = {size:.3f} GB")
    begun = time.perf_counter()
    batches = _by_cluster(images, encoder, chosen, say) if chosen.ray else _here(images, encoder, chosen)
    written: Future[None] | None = None
    with tqdm(total=len(images), desc="embed", unit="image") as bar, ThreadPoolExecutor(1) as pool:
        for features, unreadable in batches:
            if written is not None:
                written.result()
            written = pool.submit(writer.write, features, unreadable)  # Disk writes overlap with computation.
            bar.update(len(features) + len(unreadable))
        if written is not None:
            written.result()
    return time.perf_counter() - begun


def _here(images: Sequence[tuple[str, Path]], encoder: VisionEncoder, chosen: EmbedSettings) -> Iterator[Embedded]:
    import torch
    from torch.utils.data import DataLoader

    from mmphi.models.vision.image_features import features_async

    dataset: Any = DecodedImages(images, encoder.preprocess)
    loader = DataLoader(
        dataset,
        chosen.batch_size,
        num_workers=chosen.workers,
        collate_fn=stacked,
        pin_memory=torch.cuda.is_available(),
    )
    before: tuple[Callable[[], dict[str, Any]], dict[str, str]] | None = None
    for digests, pixels, unread in loader:
        begun = (dict if pixels is None else features_async(digests, pixels, encoder)), unread
        if before is not None:  # Copied and written while an accelerator computes the next batch.
            yield before[0](), before[1]
        before = begun
    if before is not None:
        yield before[0](), before[1]


def _by_cluster(
    images: Sequence[tuple[str, Path]], encoder: VisionEncoder, chosen: EmbedSettings, say: Callable[[str], None]
) -> Iterator[Embedded]:
    from mmphi.cluster.connect import join_cluster
    from mmphi.cluster.embedding import embed_on_cluster

    machines = join_cluster(chosen.ray)
    say(f"embed: Ray has {machines}")
    return embed_on_cluster(images, encoder, chosen.batch_size, machines)


STAGE = Stage(
    name="embed",
    version=2,
    help="compute the features of every image once, and store them",
    reads=("embed", "vision"),
    run=run,
    upstream=upstream,
    requests=("data", "scenes", "light_clip", "projector.num_augmentations"),
    request_upstream=scenes_if_read,
    covers=covers,
    cost=cost,
)
