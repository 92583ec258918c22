"""Stage ``projector``: the layers between image features and language model, trained with both frozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmphi.settings import Settings
from mmphi.stage import Context, Cost, Stage, Tracker

if TYPE_CHECKING:
    from mmphi.data.records import Example
    from mmphi.models.multimodal import Multimodal

VALIDATION_EXAMPLES = 200  # Enough for a loss to 0.02 nats; the full split is evaluated at the end.


def upstream(settings: Settings) -> tuple[str, ...]:
    """What the parts to be joined come from."""
    needed = []
    if settings.uses_scenes():
        needed.append("scenes")
    if settings.language.model == "pretrain":
        needed.append("pretrain")
    if settings.projector.features == "cached":
        needed.append("embed")
    elif settings.vision.model == "light_clip":
        needed.append("light_clip")
    return tuple(needed)


def inputs(settings: Settings) -> dict[str, Path]:
    """Files from outside that the result depends on."""
    files: dict[str, Path] = {}
    for i, source in enumerate(settings.data.sources):
        if source.path and source.kind != "datasets":
            files[f"data.sources.{i}.path"] = Path(source.path)
    for name in ("model", "tokenizer"):
        value = getattr(settings.language, name)
        if value and Path(value).exists():
            files[f"language.{name}"] = Path(value)
    return files


def cost(settings: Settings) -> Cost:
    """A projector and its optimiser are small: four copies of at most a few matrices."""
    return Cost(disk_bytes=4 * 4 * settings.projector.layers * 4096 * 4096)


def run(ctx: Context) -> Mapping[str, float]:
    """Train, evaluate on the test split, and save."""
    import torch

    from mmphi.data.features import LiveFeatures
    from mmphi.data.read import log_report, mixture, read_examples
    from mmphi.data.sequences import encode_all
    from mmphi.evaluation.evaluate import evaluate_model
    from mmphi.models.assemble import image_features, language_of
    from mmphi.models.multimodal import Multimodal
    from mmphi.models.projector import Projector, ProjectorConfig
    from mmphi.training.trainer import train

    settings, chosen = ctx.settings, ctx.settings.projector
    scenes = ctx.upstream.get("scenes")
    examples, report = read_examples(settings, scenes.path if scenes else None)
    features = image_features(settings, ctx.upstream)
    if isinstance(features, LiveFeatures):
        features.check(list({e.image.id: e.image for e in examples if e.image is not None}.values()))
    for example in [e for e in examples if e.image is not None and e.image.id not in features]:
        report.drop_kept(example.source, example.id, "unreadable image")
        examples.remove(example)
    language = language_of(settings, ctx.upstream)
    torch.manual_seed(settings.seed)
    projector = Projector(
        ProjectorConfig(
            features.width,
            language.width,
            chosen.layers,
            chosen.width,
            chosen.activation,
            norm=chosen.norm,
            dropout=chosen.dropout,
        )
    )
    model = Multimodal(language, projector, features, chosen.max_length)
    training = [e for e in examples if e.split == "train"]
    samples = encode_all(mixture(training, settings), language.prompt, features.tokens, chosen.max_length, report)
    log_report(report, ctx.tracker, settings)
    parameters = sum(p.numel() for p in projector.parameters())
    ctx.tracker.metrics({"projector/parameters": parameters, "projector/image_tokens": features.tokens})
    validation = [e for e in examples if e.split == "validation"]
    trained = train(
        model.packed,
        samples,
        features,
        chosen,
        seed=settings.seed,
        folder=ctx.folder,
        tracker=ctx.tracker,
        title="projector",
        validate=validator(model, validation, settings, ctx.tracker) if validation else None,
    )
    projector.save(ctx.folder)
    model.packed.eval()
    test = [e for e in examples if e.split == "test"]
    metrics = evaluate_model(model, test, settings.evaluate, ctx.tracker, prefix="test") if test else {}
    return {**metrics, "projector/steps": trained.steps}


def validator(
    model: Multimodal, examples: Sequence[Example], settings: Settings, tracker: Tracker
) -> Callable[[int], Mapping[str, float]]:
    """Loss and grounding gain on held-out images, and what the model says about a few of them."""
    from mmphi.evaluation.grounding import grounding

    chosen = list(examples[:VALIDATION_EXAMPLES])
    shown: dict[str, Example] = {}
    for example in chosen:
        if example.image is not None and len(shown) < settings.projector.sample_images:
            shown.setdefault(example.image.id, example)

    def validate(step: int) -> Mapping[str, float]:
        measured = grounding(model, chosen, seed=settings.seed)
        if shown:
            prompts = [(e.image, e.turns[0].question) for e in shown.values()]
            answers = model.generate(prompts, settings.evaluate.max_new_tokens)
            rows = [
                {
                    "step": step,
                    "image": e.image.path if e.image else "",
                    "question": e.turns[0].question,
                    "prediction": answer.text,
                    "reference": e.turns[0].answer,
                }
                for e, answer in zip(shown.values(), answers, strict=True)
            ]
            tracker.table("predictions", rows, image="image")
        return {"val/loss": measured.loss, "val/grounding_gain": measured.gain}

    return validate


STAGE = Stage(
    name="projector",
    version=1,
    help="train the layers between image features and the frozen language model",
    sections=("projector", "language", "vision", "data"),
    run=run,
    upstream=upstream,
    inputs=inputs,
    cost=cost,
)
