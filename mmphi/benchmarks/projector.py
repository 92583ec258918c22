"""Projector training steps of transformers' LLaVA and of mmphi, on the same models, images and conversations.

- ``padded``: transformers' LLaVA under transformers' Trainer. The rows of random batches are padded to the longest, the
  vision encoder runs in every step, and logits are computed at every position. On a GPU it uses flash attention if that
  is installed, and is compiled if mmphi's side is;
- ``sorted``: as ``padded``, with rows sorted by length, so that there is little padding;
- ``mmphi``: training of the stage ``projector``, with features from disk, packed rows, and logits only at supervised
  tokens;
- ``mmphi-sorted``: as ``mmphi``, on the batches of ``sorted``, so that their losses can be compared.

Each side runs in a separate process, so that its peak memory is measured separately. Losses are compared step by step;
if they differ by more than 0.001 nats per token (0.01 in bf16) the command fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmphi.benchmarks import _conversations
from mmphi.benchmarks._conversation_sides import Batches, loaded_llava, our_way, usual_way
from mmphi.benchmarks._conversations import Shape, loaded_language
from mmphi.benchmarks._pretrain_sides import Clock
from mmphi.benchmarks._side_by_side import OURS, Comparison, Side

RATE, SORTED = 1e-3, f"{OURS}-sorted"
# In the small shape the vision encoder has the same share of the work as CLIP's ViT-L/14 has with Phi-2.
SMALL = Shape(width=512, layers=8, head=64, vision_width=192, vision_layers=6, images=32)
PHI2 = _conversations.SHAPES["phi2"]
SHAPES = {
    "small": SMALL,
    "tiny": _conversations.SHAPES["tiny"],
    "phi2": PHI2,
    "phi2-4bit": replace(PHI2, quantised=True),
}


def llava_side(folder: Path, shape: Shape, batches: Batches, workers: int, watch: Sequence[Any]) -> Clock:
    """Train the projector of transformers' LLaVA; everything else is frozen."""
    import torch

    dtype = torch.bfloat16 if shape.precision == "bf16" else torch.float32
    model = loaded_llava(folder, dtype, quantised=shape.quantised)
    model._hf_peft_config_loaded = True  # The Trainer refuses any quantised model without an adapter.
    model.requires_grad_(False)
    model.model.multi_modal_projector.float().requires_grad_(True)
    compiled = compiles(shape)
    return usual_way(model, folder, shape, batches, rate=RATE, compiled=compiled, workers=workers, watch=watch)


def compiles(shape: Shape) -> bool:
    """Whether both sides are compiled: on a GPU in bf16 without quantisation, as the stage ``projector`` does."""
    import torch

    return torch.cuda.is_available() and shape.precision == "bf16" and not shape.quantised


def mmphi_side(folder: Path, shape: Shape, batches: Batches, workers: int, watch: Sequence[Any]) -> Clock:
    """Train as the stage ``projector`` does."""
    from mmphi.models.projector import Projector

    language = loaded_language(folder, "4bit" if shape.quantised else shape.precision)
    return our_way(
        language,
        Projector.load(folder),
        folder,
        shape,
        batches,
        rate=RATE,
        compiled=compiles(shape),
        workers=workers,
        watch=watch,
    )


COMPARISON = Comparison(
    name="projector",
    help=(__doc__ or "").partition("\n")[0],
    sides={
        "padded": Side(llava_side, same=OURS),
        "sorted": Side(llava_side, by_length=True, same=SORTED),
        OURS: Side(mmphi_side),
        SORTED: Side(mmphi_side, by_length=True),
    },
    shapes=SHAPES,
    outside="loading the models; compiling on a GPU; for mmphi, computing the features of the images once",
)
main = COMPARISON.main
