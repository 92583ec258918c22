"""Training of a small CLIP on images and their captions, with open_clip's own loss.

The settings are those of :class:`mmphi.config.light_clip.LightClipSettings`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor

from mmphi.config.light_clip import LightClipSettings
from mmphi.data.schema import Example, ReadReport
from mmphi.errors import DataError
from mmphi.evaluation.retrieval import recall
from mmphi.models.device import this_device
from mmphi.models.vision.light_clip import ClipShape, build, save
from mmphi.tracking.tracker import Tracker
from mmphi.training.contrastive import ClampLogitScaleCallback, ContrastiveTask, ImageTextDataset
from mmphi.training.image_dataset import ImageDataset
from mmphi.training.trainer import train
from mmphi.training.training_args import world_rank, world_size

TABLE_ROWS = 8  # Test images that are shown with the nearest caption.
EPSILON = 1e-6  # CLIP's (Radford et al. 2021, table 20)


def train_light_clip(
    examples: Sequence[Example],
    settings: LightClipSettings,
    *,
    folder: Path,
    tracker: Tracker,
    report: ReadReport | None = None,
    when_read: Callable[[], None] = lambda: None,
    first: bool = True,
) -> Mapping[str, float]:
    """Train a CLIP, measure retrieval on the test split, and save it in open_clip's format.

    Args:
        examples: Conversations of all splits; only captions are used.
        settings: Encoders, loss and optimisation.
        folder: Where checkpoints and the model are written: ``open_clip.create_model("local-dir:FOLDER")`` loads it.
        tracker: Records metrics, and the nearest caption of some test images.
        report: Counts the examples whose images cannot be read.
        when_read: Called after all images are read and before training; may raise to cancel the training.
        first: Whether this process writes the model.

    Returns:
        Recall at 1, 5 and 10 in both directions on the test split; empty if the split is empty.

    Raises:
        DataError: If no image has a caption.
        ModelError: If an encoder cannot be built.
    """
    torch.manual_seed(settings.seed)
    shape = ClipShape(**{name: getattr(settings, name) for name in ClipShape.__dataclass_fields__})
    model, tokenizer = build(shape, folder if first else Path(tempfile.mkdtemp()))  # Writes the configuration.
    preprocess = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    task = ContrastiveTask(
        model.to(this_device()),
        lock_image=settings.lock_image,
        lock_text=settings.lock_text,
        dropout=settings.dropout,
        processes=world_size(),
        rank=world_rank(),
    )
    task.eval()  # Outputs of frozen encoders are computed once, before training.
    sets: dict[str, tuple[Any, Any, list[str], list[int]]] = {}
    for split in ("train", "test"):
        of_split = [e for e in examples if e.split == split]
        if split == "test" and not of_split:  # data.test_images: 0
            tracker.say("light_clip: data.test_images is 0, so retrieval is not measured")
            continue
        pixels, captions, owners = captioned_images(of_split, report or ReadReport(), preprocess)
        images = task.image_inputs(pixels, settings.workers)
        sets[split] = images, task.text_inputs(tokenizer(captions)), captions, owners
    when_read()
    images, texts, _, owners = sets["train"]
    train(
        task,
        ImageTextDataset(
            images,
            texts,
            owners,
            steps=settings.steps,
            batch_size=settings.batch_size,
            captions=settings.captions,
            seed=settings.seed,
            processes=world_size(),
        ),
        settings,
        folder=folder,
        tracker=tracker,
        title="light_clip",
        state={name: b for name, b in task.named_buffers() if name in task.state_dict()},
        epsilon=EPSILON,
        callbacks=[ClampLogitScaleCallback(model)],
    )
    model.eval()
    if first:
        save(model, folder)
    if "test" not in sets:
        return {}
    metrics, rows = _retrieval(task, *sets["test"])
    tracker.table("zero_shot", rows)
    tracker.metrics(metrics, settings.steps)
    return metrics


def captioned_images(
    examples: Sequence[Example], report: ReadReport, preprocess: Callable[[Any], Tensor]
) -> tuple[ImageDataset, list[str], list[int]]:
    """Returns the readable images with a caption, the captions, and the image index of each caption.

    Questions are left out. Scenes have three captions: a full one, one of shapes alone and one of colors alone. Within
    a batch, colors and relation distinguish nearly all scenes, so a CLIP trained on full captions alone never learns
    the shapes.

    Raises:
        DataError: If no readable image has a caption.
    """
    captions: dict[Path, list[Example]] = {}
    for example in examples:
        if example.image is not None and example.attributes.get("kind", "caption") in ("caption", "parts"):
            captions.setdefault(example.image.path, []).append(example)
    pixels, wrong = ImageDataset.readable(list(captions), preprocess)
    for path, error in wrong.items():
        for example in captions[path]:
            report.drop_kept(example.source, example.id, error.reason)
    turns = [(i, turn) for i, path in enumerate(pixels.paths) for e in captions[path] for turn in e.turns]
    owners, texts = [i for i, _ in turns], [turn.answer for _, turn in turns]
    if not pixels.paths:
        raise DataError("no image has a caption to train a CLIP on", "add a source with captions to data.sources")
    return pixels, texts, owners


def _retrieval(
    task: ContrastiveTask, images: Any, texts: Any, captions: list[str], owners: list[int]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Recall in both directions, and the nearest caption of the first images."""
    image_embeddings, text_embeddings = task.all_embeddings(images, texts)
    metrics = {f"test/{name}": value for name, value in recall(image_embeddings, text_embeddings, owners).items()}
    best = (image_embeddings[:TABLE_ROWS] @ text_embeddings.T).argmax(dim=1).tolist()
    rows = [
        {"image": i, "nearest caption": captions[b], "its own": captions[owners.index(i)], "right": owners[b] == i}
        for i, b in enumerate(best)
    ]
    return metrics, rows
