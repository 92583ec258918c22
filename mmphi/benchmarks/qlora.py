"""QLoRA training steps of PEFT and of mmphi, with the same models, adapter, images and conversations.

- ``peft``: PEFT on transformers' LLaVA in NF4 under transformers' Trainer. Rows are padded to the longest, the vision
  encoder runs in every step, and logits are computed at every position. It follows PEFT's page on quantisation, except
  that gradient checkpointing, which costs a third, is used only if the shape sets it;
- ``peft-sorted``: as ``peft``, with rows sorted by length, so that there is little padding;
- ``mmphi``: NF4, the same adapter, stored features, packed rows, and logits only at supervised tokens;
- ``mmphi-sorted``: as ``mmphi``, on the batches of ``peft-sorted``, so that their losses can be compared.

Each side runs in a separate process, so that its peak memory is measured separately. Losses are compared step by step;
if they differ by more than 0.001 nats per token (0.01 in bf16) the command fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmphi.benchmarks._conversation_sides import Batches, loaded_llava, our_way, usual_way
from mmphi.benchmarks._conversations import SHAPES, Shape, loaded_language
from mmphi.benchmarks._pretrain_sides import Clock
from mmphi.benchmarks._side_by_side import OURS, Comparison, Side

RATE, RANK, ALPHA, SORTED = 2e-4, 16, 32, f"{OURS}-sorted"
LORA_LAYERS = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")


def peft_side(folder: Path, shape: Shape, batches: Batches, workers: int, watch: Sequence[Any]) -> Clock:
    """Train an adapter with PEFT on transformers' LLaVA."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model: Any = loaded_llava(folder, dtype, quantised=True)
    model = prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]  # PEFT does not annotate it.
        model, use_gradient_checkpointing=shape.recompute
    )
    torch.manual_seed(0)
    layers = "|".join(LORA_LAYERS)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=rf".*language_model.*\.({layers})",
        modules_to_save=["multi_modal_projector"],
    )
    model = get_peft_model(model, config)
    return usual_way(model, folder, shape, batches, rate=RATE, workers=workers, watch=watch)


def mmphi_side(folder: Path, shape: Shape, batches: Batches, workers: int, watch: Sequence[Any]) -> Clock:
    """Train as the stage ``qlora`` does."""
    from mmphi.models.language.adapter import AdapterConfig as AdapterShape
    from mmphi.models.language.adapter import add_adapter
    from mmphi.models.projector import Projector

    language = add_adapter(loaded_language(folder, "4bit"), AdapterShape(RANK, ALPHA, targets=LORA_LAYERS))
    projector = Projector.load(folder)
    return our_way(language, projector, folder, shape, batches, rate=RATE, workers=workers, watch=watch)


COMPARISON = Comparison(
    name="qlora",
    help=(__doc__ or "").partition("\n")[0],
    sides={
        "peft": Side(peft_side, same=OURS),
        "peft-sorted": Side(peft_side, by_length=True, same=SORTED),
        OURS: Side(mmphi_side),
        SORTED: Side(mmphi_side, by_length=True),
    },
    shapes=SHAPES,
    outside="loading the models; for mmphi, computing the features of the images once",
)
main = COMPARISON.main
