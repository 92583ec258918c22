"""Comparison of a model with its export to transformers: tokens, pixels and logits for drawn scenes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from mmphi.text.tokenized_example import SpanContent, join_spans

if TYPE_CHECKING:
    from mmphi.models.multimodal import Multimodal

QUESTIONS = ("What is in this picture?", "describe the picture", "Is there a red circle?\nAnswer yes or no.")
SIZES = ((336, 336), (500, 375), (240, 320))


@dataclass(frozen=True)
class CheckedOutput:
    """Inputs and outputs of a model for one question about one image.

    Attributes:
        ids: Token IDs (T,); 0 at image positions.
        image: Mask of the image positions, bool (T,).
        pixels: The preprocessed image (3, H, W).
        logits: Logits at every position (T, V), float32.
    """

    ids: Tensor
    image: Tensor
    pixels: Tensor
    logits: Tensor


def check_pictures() -> list[Image.Image]:
    """Drawn scenes of several aspect ratios: square, wide and tall."""
    from mmphi.data.scene_drawing import draw
    from mmphi.data.scenes import combinations, scenes

    rng = random.Random(0)
    drawn = scenes(len(SIZES), rng, list(combinations()))
    return [draw(scene, 400, rng).resize(size) for scene, size in zip(drawn, SIZES, strict=True)]


@torch.inference_mode()
def expected_outputs(model: Multimodal, images: Sequence[Image.Image], questions: Sequence[str]) -> list[CheckedOutput]:
    """Outputs of a model at every position of prompts with one image each.

    Image features come directly from the encoder, without the rounding of stored features to 16 bits.

    Args:
        model: Model with its vision encoder.
        images: One image per question.
        questions: Questions without ``<image>``.
    """
    encoder: Any = getattr(model.features, "encoder")  # noqa: B009  # Only live features have one.
    found = []
    for image, question in zip(images, questions, strict=True):
        pixels = encoder.scaled(encoder.preprocess(image).to(model.device)).cpu()
        features = encoder(pixels[None].to(model.device))[0]
        parts = model.language.prompt.parts([(question, None)], images=1)
        sample = join_spans(parts, [SpanContent("image", None, len(features))], question)
        ids = torch.from_numpy(sample.input_ids).long()
        (span,) = sample.spans
        places = torch.arange(span.start, span.start + span.length)
        embeddings = model.packed.embed(
            ids[None].to(model.device), {"image": features}, {"image": places.to(model.device)}
        )
        logits = model.language.model(inputs_embeds=embeddings, use_cache=False).logits[0]
        shown = torch.zeros(len(ids), dtype=torch.bool)
        shown[places] = True
        found.append(CheckedOutput(ids, shown, pixels, logits.float().cpu()))
    return found


@dataclass(frozen=True)
class Difference:
    """Differences between a model and its export.

    Attributes:
        tokens: Number of prompts whose tokens differ.
        pixels: Largest difference of a preprocessed pixel, in units of its scale before normalisation (0 to 255).
        logits: Largest difference of a logit, given equal tokens and pixels.
    """

    tokens: int
    pixels: float
    logits: float


@torch.inference_mode()
def compare_outputs(
    exported: Any,
    processor: Any,
    expected: Sequence[CheckedOutput],
    images: Sequence[Image.Image],
    questions: Sequence[str],
) -> Difference:
    """Compare an exported model with the outputs of the original.

    Args:
        exported: ``LlavaForConditionalGeneration``.
        processor: Its processor.
        expected: Outputs of the original.
        images: One image per question.
        questions: The questions of ``expected``.
    """
    token = exported.config.image_token_index
    tokens, pixels, logits = 0, 0.0, 0.0
    scale = 255 * torch.tensor(processor.image_processor.image_std)[:, None, None]
    for old, image, question in zip(expected, images, questions, strict=True):
        message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(message, add_generation_prompt=True)
        seen = processor(images=[image], text=[text], add_special_tokens=False, return_tensors="pt")
        ids = old.ids.masked_fill(old.image, token)
        tokens += seen["input_ids"][0].tolist() != ids.tolist()
        pixels = max(pixels, float(((seen["pixel_values"][0] - old.pixels).abs() * scale).max()))
        found = exported(input_ids=ids[None].to(exported.device), pixel_values=old.pixels[None].to(exported.device))
        width = old.logits.shape[1]
        logits = max(logits, float((found.logits[0, :, :width].float().cpu() - old.logits).abs().max()))
    return Difference(tokens, pixels, logits)
