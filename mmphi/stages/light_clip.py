"""Stage ``light_clip``: a small CLIP, from nothing or over pretrained towers, trained on the data's own captions."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmphi.config import DataSettings, TrainingSettings, setting
from mmphi.config.declared_view import SettingsView
from mmphi.errors import SettingsError
from mmphi.pipeline.stage import Context, Cost, Stage
from mmphi.stages.shared_models import CONTENT, check_data, check_training, log_report, read, scenes_if_read

if TYPE_CHECKING:
    from torch import Tensor

    from mmphi.data.schema import Example, ReadReport
    from mmphi.training.image_dataset import ImageDataset

SHOWN = 8
EPSILON = 1e-6  # CLIP's (Radford et al. 2021, table 20)


class LightClipSettings(TrainingSettings):
    """A small CLIP trained here with open_clip's own loss."""

    image_tower: str = setting("", "timm model name; empty trains one from nothing")
    from_nothing: Literal["resnet", "vit"] = setting("resnet", "kind of the tower trained from nothing")
    image_weights: str = setting("", "safetensors file of the vision encoder's weights", file="path")
    text_tower: str = setting(
        "", "Hugging Face folder of the text tower; empty trains a small transformer from nothing", file="path"
    )
    lock_image: bool = setting(False, "keep the vision encoder's weights as they are")
    lock_text: bool = setting(False, "keep the text tower's weights as they are")
    image_size: int = setting(64, "side of the input image", unit="px", ge=16, le=1024)
    patch_size: int = setting(8, "side of a patch (ViT)", unit="px", ge=2)
    width: int = setting(128, "width of the towers trained from nothing", unit="units", ge=16)
    layers: int = setting(4, "layers of the towers trained from nothing", unit="layers", ge=1, le=64)
    embed_dim: int = setting(128, "width of the shared space", unit="units", ge=8)
    context_length: int = setting(
        32, "longest caption of a text tower trained from nothing; more of it is cut off", unit="tokens", ge=4, le=512
    )
    steps: int = setting(600, "optimiser steps", unit="steps", ge=1)
    batch_size: int = setting(128, "images per step, over all processes", unit="images", ge=2)
    gradient_accumulation_steps: int = setting(
        1, "always 1: a contrastive loss needs its whole batch at once", ge=1, le=1, formerly="accumulation"
    )
    captions: int = setting(1, "captions of each image per step", unit="captions", ge=1, le=16)
    weight_decay: float = setting(0.1, "AdamW's weight decay", ge=0, le=1)
    warmup_ratio: float = setting(0.05, "share of the steps that warm up", ge=0, lt=1, formerly="warmup")
    beta2: float = setting(0.98, "AdamW's second decay rate", gt=0, lt=1)
    dropout: float = setting(0.0, "share of a locked tower's outputs dropped in training", ge=0, lt=1)
    workers: int = setting(2, "processes that decode images", unit="processes", affects_key=False, ge=0)


def config_of(chosen: LightClipSettings) -> dict[str, Any]:
    """open_clip's configuration of the CLIP that the settings describe, with a text tower built from nothing."""
    from mmphi.models.vision.light_clip import ClipShape, model_config

    shape = ClipShape(**{name: getattr(chosen, name) for name in ClipShape.__dataclass_fields__})
    return model_config(shape, None)


def check(settings: SettingsView) -> None:
    """A batch for every process, and towers that there are."""
    chosen = settings(LightClipSettings)
    check_training("light_clip", chosen)
    check_data(settings)
    for half, weights in (("image", "image_weights"), ("text", "text_tower")):
        if getattr(chosen, f"lock_{half}") and not getattr(chosen, weights):
            raise SettingsError(
                f"light_clip.lock_{half} keeps a tower of random weights as it is",
                f"give light_clip.{weights}, or train it: lock_{half} false",
            )
    if chosen.image_tower:
        import timm

        if not timm.is_model(chosen.image_tower):
            near = difflib.get_close_matches(chosen.image_tower, timm.list_models(), n=3, cutoff=0.4)
            raise SettingsError(
                f"light_clip.image_tower = {chosen.image_tower} is not a timm model",
                f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them",
            )
    if chosen.text_tower and not (Path(chosen.text_tower) / "config.json").is_file():
        raise SettingsError(
            f"light_clip.text_tower = {chosen.text_tower} holds no config.json", "give a Hugging Face model's folder"
        )


def cost(settings: SettingsView) -> Cost:
    """Weights, and a checkpoint with two moments of each."""
    chosen = settings(LightClipSettings)
    from_nothing = 12 * chosen.layers * chosen.width**2 * 2 + 49408 * chosen.width
    return Cost(16 * from_nothing)


def run(ctx: Context) -> Mapping[str, float]:
    """Train, measure retrieval on held-out images, and save."""
    import torch
    from open_clip.transform import PreprocessCfg, image_transform_v2

    from mmphi.models.device import this_device
    from mmphi.models.vision.light_clip import ClipShape, build, save
    from mmphi.training.contrastive import ClampLogitScaleCallback, ContrastiveTask, ImageTextDataset
    from mmphi.training.trainer import train
    from mmphi.training.training_args import world_rank, world_size

    chosen = ctx.settings(LightClipSettings)
    examples, report = read(ctx.settings, ctx.upstream)
    torch.manual_seed(chosen.seed)
    shape = ClipShape(**{name: getattr(chosen, name) for name in ClipShape.__dataclass_fields__})
    model, tokenizer = build(shape, ctx.folder if ctx.first else Path(tempfile.mkdtemp()))
    preprocess = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    clip = ContrastiveTask(
        model.to(this_device()),
        lock_image=chosen.lock_image,
        lock_text=chosen.lock_text,
        dropout=chosen.dropout,
        processes=world_size(),
        rank=world_rank(),
    )
    clip.eval()  # What locked towers give is computed once, before any training.
    sets: dict[str, tuple[Any, Any, list[str], list[int]]] = {}
    for split in ("train", "test"):
        own = [e for e in examples if e.split == split]
        if split == "test" and not own:  # data.test_images: 0
            ctx.tracker.say("light_clip: data.test_images is 0, so retrieval is not measured")
            continue
        pixels, captions, owners = pairs(own, report, preprocess)
        images = clip.image_inputs(pixels, chosen.workers)
        sets[split] = images, clip.text_inputs(tokenizer(captions)), captions, owners
    log_report(report, ctx.tracker, ctx.settings(DataSettings))
    images, texts, _, owners = sets["train"]
    train(
        clip,
        ImageTextDataset(
            images,
            texts,
            owners,
            steps=chosen.steps,
            batch_size=chosen.batch_size,
            captions=chosen.captions,
            seed=chosen.seed,
            processes=world_size(),
        ),
        chosen,
        folder=ctx.folder,
        tracker=ctx.tracker,
        title="light_clip",
        state={name: b for name, b in clip.named_buffers() if name in clip.state_dict()},
        epsilon=EPSILON,
        callbacks=[ClampLogitScaleCallback(model)],
    )
    model.eval()
    if ctx.first:
        save(model, ctx.folder)
    return _measure(ctx, clip, *sets["test"]) if "test" in sets else {}


def pairs(
    examples: Sequence[Example], report: ReadReport, preprocess: Callable[[Any], Tensor]
) -> tuple[ImageDataset, list[str], list[int]]:
    """Every readable image that has a caption, the captions, and whose they are; questions are left out.

    Scenes have three captions: the full one, one of shapes and one of colors alone. Among the pairs of a batch, colors
    and relation tell nearly all scenes apart, and a CLIP trained on full captions alone never learns the shapes.

    Raises:
        DataError: If there is none.
    """
    from mmphi.errors import DataError
    from mmphi.training.image_dataset import ImageDataset

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
        raise DataError("no image has a caption to train a CLIP on", "name a source of captions in data.sources")
    return pixels, texts, owners


def _measure(
    ctx: Context, clip: Any, images: Any, texts: Any, captions: list[str], owners: list[int]
) -> dict[str, float]:
    from mmphi.evaluation.retrieval import recall

    seen, read_texts = clip.all_embeddings(images, texts)
    metrics = {f"test/{name}": value for name, value in recall(seen, read_texts, owners).items()}
    best = (seen[:SHOWN] @ read_texts.T).argmax(dim=1).tolist()
    rows = [
        {"image": i, "nearest caption": captions[b], "its own": captions[owners.index(i)], "right": owners[b] == i}
        for i, b in enumerate(best)
    ]
    ctx.tracker.table("zero_shot", rows)
    ctx.tracker.metrics(metrics, ctx.settings(LightClipSettings).steps)
    return metrics


STAGE = Stage(
    name="light_clip",
    version=4,
    help="train a small CLIP on the data's own captions",
    reads=("light_clip", *CONTENT),
    run=run,
    upstream=scenes_if_read,
    requests=("data.sources.N.question",),
    check=check,
    cost=cost,
    trains=True,
)
