"""Adapter steps side by side: the same models, adapter, images and conversations, the usual way and here.

- ``peft``: PEFT on transformers' LLaVA in NF4 under transformers' Trainer, rows padded to the longest, the vision
  encoder in the loop, logits at every position; as PEFT's page on quantisation shows it, but that it recomputes only
  where the shape says so: it costs a third;
- ``peft-sorted``: the same, rows sorted by length, so that little is padded;
- ``mmphi``: NF4, the same adapter, stored features, packed rows, logits only where a token is learned;
- ``mmphi-sorted``: the same on the batches of ``peft-sorted``, so that losses can be compared.

Each side runs in a process of its own, so that its peak memory is its own. Losses are compared step by step; where they
differ by more than 0.001 nats per token (0.01 in bf16) the command fails.
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
    """PEFT on transformers' LLaVA."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model: Any = loaded_llava(folder, dtype, quantised=True)
    model = prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]  # PEFT gives it no types.
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
    """As the stage ``qlora`` runs it."""
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
