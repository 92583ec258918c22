"""Stage ``light_clip``: trains a small CLIP on the data's captions, from scratch or from pretrained towers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmphi.config import DataSettings
from mmphi.config.declared_view import SettingsView
from mmphi.config.light_clip import LightClipSettings
from mmphi.errors import SettingsError
from mmphi.pipeline.stage import Context, Cost, Stage
from mmphi.stages.shared_models import CONTENT, check_data, check_training, log_report, read, scenes_if_read


def config_of(chosen: LightClipSettings) -> dict[str, Any]:
    """open_clip's configuration of the CLIP that the settings describe, with a text tower trained from scratch."""
    from mmphi.models.vision.light_clip import ClipShape, model_config

    shape = ClipShape(**{name: getattr(chosen, name) for name in ClipShape.__dataclass_fields__})
    return model_config(shape, None)


def check(settings: SettingsView) -> None:
    """Check the batch size, the data, and that locked and pretrained towers exist."""
    chosen = settings(LightClipSettings)
    check_training("light_clip", chosen)
    check_data(settings)
    for half, weights in (("image", "image_weights"), ("text", "text_tower")):
        if getattr(chosen, f"lock_{half}") and not getattr(chosen, weights):
            raise SettingsError(
                f"light_clip.lock_{half} would freeze a tower with random weights",
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
    """Disk space of the weights and of a checkpoint with two moments per weight."""
    chosen = settings(LightClipSettings)
    from_nothing = 12 * chosen.layers * chosen.width**2 * 2 + 49408 * chosen.width
    return Cost(16 * from_nothing)


def run(ctx: Context) -> Mapping[str, float]:
    """Train the CLIP, measure retrieval on held-out images, and save it."""
    from mmphi.training.light_clip import train_light_clip

    examples, report = read(ctx.settings, ctx.upstream)
    return train_light_clip(
        examples,
        ctx.settings(LightClipSettings),
        folder=ctx.folder,
        tracker=ctx.tracker,
        report=report,
        when_read=lambda: log_report(report, ctx.tracker, ctx.settings(DataSettings)),
        first=ctx.first,
    )


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
