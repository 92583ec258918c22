"""Pretraining of a causal language model on packed conversations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PhiConfig, PhiForCausalLM

from mmphi.config.pretrain import PretrainSettings
from mmphi.models.device import this_device
from mmphi.models.language.phi import count_parameters
from mmphi.models.packed_vlm import PackedVLM
from mmphi.models.patches.module_patches import apply_patches
from mmphi.text.packing import Layout, packs, to_device
from mmphi.text.tokenized_example import TokenizedExample
from mmphi.tracking.tracker import Tracker
from mmphi.training.lr_scaling import with_learning_rates
from mmphi.training.packed_dataset import packed_dataset
from mmphi.training.trainer import train

VALIDATION_PACK_TOKENS = 4096


def pretrain_on_conversations(
    samples: Sequence[TokenizedExample],
    held_out: Mapping[str, Sequence[TokenizedExample]],
    settings: PretrainSettings,
    config: PhiConfig,
    *,
    folder: Path,
    tracker: Tracker,
) -> tuple[PhiForCausalLM, dict[str, float]]:
    """Train a causal language model from scratch on conversations.

    Args:
        samples: Training conversations.
        held_out: Validation conversations, by metric name.
        settings: Optimisation and number of steps.
        config: Shape of the model.
        folder: Where checkpoints are written; an interrupted training resumes from the newest.
        tracker: Records metrics.

    Returns:
        The model, and the held-out losses in nats per supervised token.
    """
    torch.manual_seed(settings.seed)
    model = apply_patches(PhiForCausalLM(config).to(this_device()))
    parameters, tokens = count_parameters(config), sum(map(len, samples))
    tracker.metrics({"pretrain/parameters": parameters.total, "pretrain/corpus_tokens": tokens})
    packed = PackedVLM(model, layout=Layout(width=settings.width))
    validate = _validator(packed, held_out)
    batch_tokens = settings.batch_size * tokens // max(1, len(samples))
    with packed.recomputing(settings.gradient_checkpointing):
        train(
            packed,
            packed_dataset(samples, {}, settings, layout=packed.layout),
            with_learning_rates(settings, parameters.inner, settings.width, batch_tokens),
            folder=folder,
            tracker=tracker,
            title="pretrain",
            validate=validate,
        )
    packed.eval()
    return model, validate(settings.steps)


def _validator(
    packed: PackedVLM, held_out: Mapping[str, Sequence[TokenizedExample]]
) -> Callable[[int], dict[str, float]]:
    """Returns a function that measures the loss per supervised token of each held-out set."""
    device = next(packed.parameters()).device

    @torch.inference_mode()
    def loss(samples: Sequence[TokenizedExample]) -> float:
        nats, tokens = 0.0, 0
        for pack in packs(samples, {}, VALIDATION_PACK_TOKENS, layout=packed.layout):
            nats += float(packed(**to_device(pack, device)))
            tokens += len(pack["targets"])
        return nats / tokens

    def validate(_: int) -> dict[str, float]:
        return {name: loss(samples) for name, samples in held_out.items()}

    return validate
