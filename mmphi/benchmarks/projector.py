"""Projector steps side by side: the same models, images and conversations, the usual way and here.

- ``padded``: transformers' LLaVA under transformers' Trainer, rows padded to the longest of a batch drawn at random,
  the vision encoder in the loop, logits at every position; on a GPU with flash attention where it is installed, and
  compiled where mmphi's side is;
- ``sorted``: the same, rows sorted by length, so that little is padded;
- ``mmphi``: the projector's own training on features read from disk, packed, logits only where a token is learned;
- ``mmphi-sorted``: the same on the batches of ``sorted``, so that losses can be held against each other.

Each side runs in a process of its own, so that its peak memory is its own. Losses are shown step by step; where they
differ by more than 0.001 nats per token (0.01 in bf16) the command fails.
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
# In the small one the vision encoder is as small a part of the work as CLIP's ViT-L/14 is beside Phi-2.
SMALL = Shape(width=512, layers=8, head=64, vision_width=192, vision_layers=6, images=32)
PHI2 = _conversations.SHAPES["phi2"]
SHAPES = {
    "small": SMALL,
    "tiny": _conversations.SHAPES["tiny"],
    "phi2": PHI2,
    "phi2-4bit": replace(PHI2, quantised=True),
}


def llava_side(folder: Path, shape: Shape, batches: Batches, workers: int, watch: Sequence[Any]) -> Clock:
    """Transformers' LLaVA, all but its projector frozen."""
    import torch

    dtype = torch.bfloat16 if shape.precision == "bf16" else torch.float32
    model = loaded_llava(folder, dtype, quantised=shape.quantised)
    model._hf_peft_config_loaded = True  # The Trainer refuses quantised models without an adapter, whatever is trained.
    model.requires_grad_(False)
    model.model.multi_modal_projector.float().requires_grad_(True)
    compiled = compiles(shape)
    return usual_way(model, folder, shape, batches, rate=RATE, compiled=compiled, workers=workers, watch=watch)


def compiles(shape: Shape) -> bool:
    """Whether both sides are compiled: on a GPU in bf16 without quantisation, as the stage ``projector`` does."""
    import torch

    return torch.cuda.is_available() and shape.precision == "bf16" and not shape.quantised


def mmphi_side(folder: Path, shape: Shape, batches: Batches, workers: int, watch: Sequence[Any]) -> Clock:
    """As the stage ``projector`` runs it."""
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
