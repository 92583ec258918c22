"""Stage ``light_clip``: a small CLIP, from nothing or over pretrained towers, trained on the data's own captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmphi.settings import Settings
from mmphi.stage import Context, Cost, Stage

if TYPE_CHECKING:
    from mmphi.data.records import Example, ReadReport

SHOWN = 8


def upstream(settings: Settings) -> tuple[str, ...]:
    """Scenes where they are read."""
    return ("scenes",) if settings.uses_scenes() else ()


def inputs(settings: Settings) -> dict[str, Path]:
    """Data files and the towers' weights."""
    files = {
        f"data.sources.{i}.path": Path(source.path)
        for i, source in enumerate(settings.data.sources)
        if source.path and source.kind != "datasets"
    }
    for name in ("image_weights", "text_tower"):
        value = getattr(settings.light_clip, name)
        if value:
            files[f"light_clip.{name}"] = Path(value)
    return files


def cost(settings: Settings) -> Cost:
    """Weights, and a checkpoint with two moments of each."""
    chosen = settings.light_clip
    from_nothing = 12 * chosen.layers * chosen.width**2 * 2 + 49408 * chosen.width
    return Cost(16 * from_nothing)


def run(ctx: Context) -> Mapping[str, float]:
    """Train, measure retrieval on held-out images, and save."""
    import torch
    from open_clip.transform import PreprocessCfg, image_transform_v2

    from mmphi.data.read import log_report, read_examples
    from mmphi.models.light_clip import build, save
    from mmphi.training.contrastive import Pairs, train_clip

    settings, chosen = ctx.settings, ctx.settings.light_clip
    scenes = ctx.upstream.get("scenes")
    examples, report = read_examples(settings, scenes.path if scenes else None)
    torch.manual_seed(settings.seed)
    model, tokenizer = build(chosen, ctx.folder)
    preprocess = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    if chosen.lock_image:
        (model.visual.trunk if hasattr(model.visual, "trunk") else model.visual).requires_grad_(False)
    if chosen.lock_text:
        (model.text.transformer if hasattr(model, "text") else model.transformer).requires_grad_(False)
    found = {}
    for split in ("train", "test"):
        images, captions, owners = _load([e for e in examples if e.split == split], preprocess, report)
        pairs = Pairs(
            model,
            images,
            tokenizer(captions),
            owners,
            lock_image=chosen.lock_image,
            lock_text=chosen.lock_text,
            dropout=chosen.dropout,
        )
        found[split] = pairs, captions, owners
    log_report(report, ctx.tracker, settings)
    train_clip(model, found["train"][0], chosen, seed=settings.seed, folder=ctx.folder, tracker=ctx.tracker)
    model.eval()
    save(model, ctx.folder)
    return _measure(*found["test"], ctx)


def _load(examples: Sequence[Example], preprocess: Any, report: ReadReport) -> tuple[Any, list[str], list[int]]:
    """Pixels of every image with a caption, its captions, and whose they are; questions are left out.

    Scenes have three captions: the full one, one of shapes and one of colors alone. Among the pairs of a batch, colors
    and relation tell nearly all scenes apart, and a CLIP trained on full captions alone never learns the shapes.
    """
    import torch
    from tqdm.auto import tqdm

    from mmphi.data.images import open_image
    from mmphi.errors import DataError, ImageError

    captions: dict[str, list[Example]] = {}
    for example in examples:
        if example.image is not None and example.attributes.get("kind", "caption") in ("caption", "parts"):
            captions.setdefault(example.image.id, []).append(example)
    pixels: list[Any] = []
    texts: list[str] = []
    owners: list[int] = []
    for of_image in tqdm(captions.values(), desc="images", unit="image", leave=False):
        image = of_image[0].image
        try:
            pixels.append(preprocess(open_image(image.path)) if image else None)
        except ImageError as error:
            for example in of_image:
                report.drop_kept(example.source, example.id, error.reason)
            continue
        for example in of_image:
            texts += [turn.answer for turn in example.turns]
            owners += [len(pixels) - 1] * len(example.turns)
    if not pixels:
        raise DataError("no image has a caption to train a CLIP on", "name a source of captions in data.sources")
    return torch.stack(pixels), texts, owners


def _measure(pairs: Any, captions: list[str], owners: list[int], ctx: Context) -> dict[str, float]:
    from mmphi.evaluation.retrieval import recall

    images, texts = pairs.all_embeddings()
    metrics = {f"test/{name}": value for name, value in recall(images, texts, owners).items()}
    best = (images[:SHOWN] @ texts.T).argmax(dim=1).tolist()
    rows = [
        {"image": i, "nearest caption": captions[b], "its own": captions[owners.index(i)], "right": owners[b] == i}
        for i, b in enumerate(best)
    ]
    ctx.tracker.table("zero_shot", rows)
    ctx.tracker.metrics(metrics, ctx.settings.light_clip.steps)
    return metrics


STAGE = Stage(
    name="light_clip",
    version=1,
    help="train a small CLIP on the data's own captions",
    sections=("light_clip", "data"),
    run=run,
    upstream=upstream,
    inputs=inputs,
    cost=cost,
)
