"""Whether a model and its form in transformers say the same: tokens, pixels and logits of drawn scenes."""

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
    """What a model makes of one question about one image.

    Attributes:
        ids: Token ids; 0 where the image stands.
        image: Which places those are.
        pixels: The preprocessed image (3, H, W).
        logits: At every place (T, V).
    """

    ids: Tensor
    image: Tensor
    pixels: Tensor
    logits: Tensor


def check_pictures() -> list[Image.Image]:
    """Drawn scenes of several forms: square, wide and high."""
    from mmphi.data.scene_drawing import draw
    from mmphi.data.scenes import combinations, scenes

    rng = random.Random(0)
    drawn = scenes(len(SIZES), rng, list(combinations()))
    return [draw(scene, 400, rng).resize(size) for scene, size in zip(drawn, SIZES, strict=True)]


@torch.inference_mode()
def expected_outputs(model: Multimodal, images: Sequence[Image.Image], questions: Sequence[str]) -> list[CheckedOutput]:
    """Logits of every place of an open question.

    Image features are taken as they leave the encoder, and not rounded to 16 bits as they are where they are stored.

    Args:
        model: With its vision encoder.
        images: One for each question.
        questions: Without ``<image>``.
    """
    encoder: Any = getattr(model.features, "encoder")  # noqa: B009  # Live features have one.
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
    """How far two forms of a model are apart.

    Attributes:
        tokens: Prompts that are written in other tokens.
        pixels: Largest difference of a preprocessed pixel, in units of its scale before normalisation (0 to 255).
        logits: Largest difference of a logit, from equal tokens and pixels.
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
    """Ask the exported model the same.

    Args:
        exported: ``LlavaForConditionalGeneration``.
        processor: Its processor.
        expected: What the original makes of it.
        images: One for each question.
        questions: As the original was asked.
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
