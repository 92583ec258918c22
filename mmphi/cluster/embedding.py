"""Image features computed by all machines of a cluster, and returned to one process.

A machine needs neither the images nor the encoder on its disk: image contents and encoder weights are sent. If a
machine is lost, Ray reassigns its batches to others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmphi.allocator import keep_freed_memory
from mmphi.cluster.connect import Machines, import_ray
from mmphi.data.augmentation import augmented_image
from mmphi.data.images import image_bytes, image_in
from mmphi.errors import ImageError
from mmphi.models.vision.image_features import Embedded, features_of

if TYPE_CHECKING:
    from mmphi.models.vision.vision_encoder import VisionEncoder

AHEAD = 2  # Batches in flight per concurrent task: one is computed while the next is sent.
_TOWERS: dict[str, Any] = {}  # Encoder of a worker process, kept for all batches.


def embed_on_cluster(
    images: Sequence[tuple[str, Path]], encoder: VisionEncoder, batch: int, machines: Machines
) -> Iterator[Embedded]:
    """Yields, as batches complete, fp16 features (tokens, width) by digest, and error reasons of unreadable images.

    Args:
        images: Digest and path of each image.
        encoder: Vision encoder.
        batch: Images per batch.
        machines: Resources of the cluster.
    """
    ray = import_ray()

    sent = ray.put(copy.deepcopy(encoder).cpu())  # A copy: this process keeps its encoder on its device.
    work = ray.remote(max_retries=-1, **machines.share())(_batch)
    todo = (images[start : start + batch] for start in range(0, len(images), batch))
    open_: list[Any] = []
    while True:
        while len(open_) < AHEAD * machines.places() and (part := next(todo, None)) is not None:
            unread: dict[str, str] = {}
            contents: list[tuple[str, bytes]] = []
            for digest, path in part:
                try:
                    contents.append((digest, image_bytes(path)))
                except ImageError as error:
                    unread[digest] = error.reason
            if unread:
                yield {}, unread
            if contents:
                open_.append(
                    work.remote([sent], encoder.digest, contents)
                )  # In a list, the encoder is sent once to each machine.
        if not open_:
            return
        done, open_ = ray.wait(open_)
        for each in done:
            yield ray.get(each)


def _batch(sent: list[Any], digest: str, contents: Sequence[tuple[str, bytes]]) -> Embedded:
    """Features of one batch; runs on a machine of the cluster."""
    keep_freed_memory()
    encoder, pixels, unread = _tower(sent, digest), {}, {}
    for name, content in contents:
        try:
            pixels[name] = encoder.preprocess(augmented_image(image_in(content, name), name))
        except ImageError as error:
            unread[name] = error.reason
    return features_of(pixels, encoder), unread


def _tower(sent: list[Any], digest: str) -> Any:
    ray = import_ray()

    from mmphi.models.device import this_device

    if digest not in _TOWERS:
        _TOWERS.clear()
        _TOWERS[digest] = ray.get(sent[0]).to(this_device())
    return _TOWERS[digest]
