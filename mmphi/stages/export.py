"""Stage ``export``: writes a model as a folder for ``LlavaForConditionalGeneration.from_pretrained``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmphi.config import Section, VisionSettings, setting
from mmphi.config.declared_view import SettingsView
from mmphi.config.light_clip import LightClipSettings
from mmphi.config.projector import ProjectorSettings
from mmphi.errors import ModelError
from mmphi.pipeline.stage import Context, Stage

if TYPE_CHECKING:
    from mmphi.models.multimodal import Multimodal

TOLERANCE = 1e-4  # Maximum difference of a logit, in fp32.
CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
---

# {name} for questions about images

Made by mmphi from run {run} for `LlavaForConditionalGeneration`; on {asked} questions about drawn scenes its logits
were within {logits:.1e} of the original's, before its weights were rounded to {precision}.

```python
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained("FOLDER")
processor = AutoProcessor.from_pretrained("FOLDER")
message = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "what is this?"}}]}}]
text = processor.apply_chat_template(message, add_generation_prompt=True)
inputs = processor(images=[image], text=[text], add_special_tokens=False, return_tensors="pt")
answer = processor.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
```

`transformers serve` accepts the folder, too.
"""


class ExportSettings(Section):
    """Export to the LLaVA classes of transformers, for `transformers serve`, vLLM and other LLaVA tools."""

    model: str = setting("", "folder or run of the model; empty takes that of `stage`", file="model")
    stage: Literal["projector", "qlora", "merge"] = setting("qlora", "stage of the exported model if `model` is empty")
    precision: Literal["bf16", "fp32"] = setting("bf16", "precision of the saved weights; compared in fp32 before")


def upstream(settings: SettingsView) -> tuple[str, ...]:
    """The stage whose model is exported, unless ``export.model`` names one."""
    chosen = settings(ExportSettings)
    return () if chosen.model else (chosen.stage,)


def check(settings: SettingsView) -> None:
    """Check, before anything is trained, that LLaVA can represent the model.

    Raises:
        ModelError: If it cannot; the message gives the reason.
    """
    from mmphi.models.export.llava_export import UNFIT, check_projector
    from mmphi.models.projector import ProjectorConfig

    if settings(ExportSettings).model:
        return
    projector, vision = settings(ProjectorSettings), settings(VisionSettings)
    check_projector(
        ProjectorConfig(1, projector.width, projector.layers, projector.width, norm=projector.norm, kind=projector.kind)
    )
    if vision.pool != 1:
        raise ModelError(f"vision.pool = {vision.pool}, but LLaVA does not pool patches", UNFIT)
    clip = settings(LightClipSettings)
    if vision.model == "light_clip" and (clip.image_tower or clip.from_nothing != "vit"):
        raise ModelError(
            f"the vision encoder is a {clip.image_tower or clip.from_nothing}, but LLaVA requires a CLIP ViT",
            "train with vision.model = ViT-..., or light_clip.from_nothing = vit",
        )


def run(ctx: Context) -> Mapping[str, float]:
    """Convert the model, compare its logits and tokens with the original's, and save it.

    Raises:
        ModelError: If LLaVA cannot represent the model, or the converted model's logits or tokens differ.
    """
    import torch

    from mmphi.models.export.llava_check import QUESTIONS, check_pictures, compare_outputs, expected_outputs
    from mmphi.models.export.llava_export import as_llava, save_llava

    chosen = ctx.settings(ExportSettings)
    folder = ctx.models["export.model"] if chosen.model else ctx.upstream[chosen.stage].path
    model = plain_model(folder)
    images = check_pictures()
    expected = expected_outputs(model, images, QUESTIONS)
    exported, processor = as_llava(model)
    found = compare_outputs(exported, processor, expected, images, QUESTIONS)
    ctx.tracker.say(
        f"export: logits of {len(QUESTIONS)} questions differ by {found.logits:.1e} at most, pixels by"
        f" {found.pixels:.2f} of 255"
    )
    if not found.logits < TOLERANCE:
        raise ModelError(
            f"the exported model's logits differ by {found.logits:.2g}, more than {TOLERANCE:g}: its language model"
            " does something that LLaVA's does not (scaled or capped logits, for instance)",
            "use the model with mmphi.load",
        )
    if found.tokens:
        raise ModelError(
            f"the processor tokenizes {found.tokens} of {len(QUESTIONS)} questions differently from the"
            " prompts of its training",
            "use the model with mmphi.load, or train it with language.prompt = chat",
        )
    figures = {"export/logit_difference": found.logits, "export/pixel_difference": found.pixels}
    if chosen.precision == "bf16":
        for weight in exported.parameters():  # Buffers with rotary frequencies stay in fp32, as they are loaded.
            weight.data = weight.data.to(torch.bfloat16)
        figures["export/logit_difference_bf16"] = compare_outputs(
            exported, processor, expected, images, QUESTIONS
        ).logits
    save_llava(exported, processor, ctx.folder)
    (ctx.folder / "README.md").write_text(
        CARD.format(
            name=Path(model.language.name).name,
            run=ctx.upstream[chosen.stage].run_id if not chosen.model else chosen.model,
            asked=len(QUESTIONS),
            logits=found.logits,
            precision=chosen.precision,
        )
    )
    ctx.tracker.say(f"export: LlavaForConditionalGeneration.from_pretrained({str(ctx.folder)!r})")
    return figures


def plain_model(folder: Path) -> Multimodal:
    """Load a model in fp32, with quantised layers dequantised and the adapter merged."""
    import torch

    from mmphi.models.checkpoint import load_checkpoint, read_description
    from mmphi.models.language.adapter import merge_adapter
    from mmphi.models.multimodal import Multimodal

    # An adapter was trained on the rounded base, which is kept; without an adapter, fp32 weights are more exact.
    model = load_checkpoint(folder, precision="" if "adapter" in read_description(folder) else "fp32")
    language = merge_adapter(model.language, torch.float32)
    encoder = getattr(model.features, "encoder", None)
    if encoder is not None:
        encoder.visual.float()
    return Multimodal(
        language, model.projector, model.features, model.max_length, model.vision, questions=model.questions
    )


STAGE = Stage(
    name="export",
    version=1,
    help="write the model in transformers' LLaVA format",
    reads=("export",),
    run=run,
    upstream=upstream,
    requests=("projector", "vision", "light_clip"),
    check=check,
)
