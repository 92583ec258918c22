"""Trains one projector the usual way: transformers' Llava, padded batches, the vision encoder run at every step.

Follows transformers' documentation of LLaVA: images and texts are batched, padded to the longest and passed to the
model with their labels. ``mmphi benchmark ablation`` compares a study with it, one process per training.

    python llava_script.py WORK.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    get_cosine_schedule_with_warmup,
)


def build(language: str, vision: str, projector: str, image_token: int) -> Any:
    """Build a LLaVA from a language model and a vision encoder; all parameters except the projector's are frozen.

    Args:
        language: Folder of the language model.
        vision: Folder of the CLIP vision encoder.
        projector: Safetensors file with the initial weights of the projector.
        image_token: Token id of image positions.

    Raises:
        ValueError: If the head of the language model has a non-zero bias, which transformers' Llava does not support.
    """
    causal, encoder = AutoModelForCausalLM.from_pretrained(language), CLIPVisionModel.from_pretrained(vision)
    text = AutoConfig.from_pretrained(language)
    config = LlavaConfig(vision_config=encoder.config, text_config=text, image_token_index=image_token)
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(causal.model.state_dict())
    if causal.lm_head.bias is not None and causal.lm_head.bias.any():
        raise ValueError("transformers' Llava has no bias in its head, and this language model has one")
    model.lm_head.load_state_dict({"weight": causal.lm_head.weight})
    model.model.vision_tower.load_state_dict(encoder.state_dict())
    weights = load_file(projector)
    for name, place in (("linear_1", 0), ("linear_2", 2)):
        layer = getattr(model.model.multi_modal_projector, name)
        layer.load_state_dict({k: weights[f"layers.{place}.{k}"] for k in ("weight", "bias")})
    model.requires_grad_(False).eval()
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def batch(rows: list[dict[str, Any]], preprocess: Any, image_token: int, pad: int) -> dict[str, torch.Tensor]:
    """Collate rows into model inputs, padded to the longest row.

    Args:
        rows: Rows with token ids, supervision mask, image path and image span.
        preprocess: Image transform.
        image_token: Token id of image positions.
        pad: Token id of padding.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` of shape (rows, longest), and ``pixel_values``.
    """
    longest = max(len(row["ids"]) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for place, row in enumerate(rows):
        sequence, learned = torch.tensor(row["ids"]), torch.tensor(row["supervised"], dtype=torch.bool)
        start, length = row["image_at"]
        shown = sequence.clone()
        shown[start : start + length] = image_token
        ids[place, : len(sequence)] = shown
        labels[place, : len(sequence)] = torch.where(learned, sequence, -100)
        mask[place, : len(sequence)] = 1
    pixels = torch.stack([preprocess(Image.open(row["image"]).convert("RGB")) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def main(path: str) -> None:
    """Train as specified in a JSON file, and write the losses to ``.out.json`` next to it."""
    work = json.loads(Path(path).read_text())
    image_token, pad = work["image_token"], work["pad"]
    model = build(work["language"], work["vision"], work["projector"], image_token)
    preprocess = image_transform_v2(PreprocessCfg(**work["preprocess"]), is_train=False)
    trained = list(model.model.multi_modal_projector.parameters())
    optimizer = torch.optim.AdamW(trained, lr=work["learning_rate"], weight_decay=0.0)
    steps = work["steps"]
    schedule = get_cosine_schedule_with_warmup(optimizer, round(work["warmup"] * len(steps)), len(steps))
    chosen = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    losses = []
    for rows in steps:
        loss = model(**batch(rows, preprocess, image_token, pad), **chosen, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    nats = tokens = 0.0
    with torch.inference_mode():
        for first in range(0, len(work["test"]), 16):
            inputs = batch(work["test"][first : first + 16], preprocess, image_token, pad)
            count = int((inputs["labels"][:, 1:] >= 0).sum())
            nats += float(model(**inputs, **chosen, use_cache=False).loss) * count
            tokens += count
    Path(path).with_suffix(".out.json").write_text(json.dumps({"losses": losses, "test": nats / tokens}))


if __name__ == "__main__":
    main(sys.argv[1])
