"""Applies and removes the patches of transformers' models.

========== ============================================================ =====================================
purpose    patches                                                      scope
========== ============================================================ =====================================
any        fused activation, dtype of layer norms                       from loading or creating a model on
training   variable-length attention                                    rows of several sequences
decoding   linear layers for few rows, grouped-query decode attention   decode steps on a CPU
========== ============================================================ =====================================

Three patches are not part of the pair:

- :func:`~mmphi.models.patches.dequantized_linear.dequantize_layers_once` cannot be removed: it is applied once, when a
  model with 4-bit layers is loaded.
- :func:`~mmphi.models.patches.bn_folding.fold_batch_norms` cannot be removed, because it changes the weights of
  convolutions. It is applied to encoders that are frozen and not saved.
- :func:`~mmphi.models.patches.sparse_last_layer.compute_at_positions` depends on the batch and ends with one forward
  pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from mmphi.models.patches.cpu_linear import apply_small_batch_linear, remove_small_batch_linear
from mmphi.models.patches.fused_gelu import apply_fused_gelu, remove_fused_gelu
from mmphi.models.patches.gqa_decode_attention import apply_gqa_decode_attention, remove_gqa_decode_attention
from mmphi.models.patches.layer_norm_dtype import apply_layer_norm_dtype, remove_layer_norm_dtype
from mmphi.models.patches.varlen_attention import apply_varlen_attention, remove_varlen_attention

Purpose = Literal["any", "training", "decoding"]


class Patch(NamedTuple):
    """A patch that can be removed.

    Attributes:
        apply: Patches a model in place; returns whether it changed anything. A second call changes nothing.
        remove: Undoes ``apply``; does nothing if the patch is not applied.
    """

    apply: Callable[[Any], bool]
    remove: Callable[[Any], None]


PATCHES: Mapping[Purpose, tuple[Patch, ...]] = {
    "any": (
        Patch(apply_fused_gelu, remove_fused_gelu),
        Patch(apply_layer_norm_dtype, remove_layer_norm_dtype),
    ),
    "training": (Patch(apply_varlen_attention, remove_varlen_attention),),
    "decoding": (
        Patch(apply_small_batch_linear, remove_small_batch_linear),
        Patch(apply_gqa_decode_attention, remove_gqa_decode_attention),
    ),
}


def apply_patches(model: Any, purpose: Purpose = "any") -> Any:
    """Patch a model in place; its results are the same.

    Names of modules and parameters do not change, so states stay interchangeable.

    Args:
        model: A transformers model.
        purpose: Patches to apply, by the table of this module. Those of ``any`` are not part of the other two.

    Returns:
        The same model.
    """
    for patch in PATCHES[purpose]:
        patch.apply(model)
    return model


def remove_patches(model: Any, purpose: Purpose | None = None) -> Any:
    """Undo :func:`apply_patches`.

    Args:
        model: A transformers model, patched or not.
        purpose: Patches to remove; ``None`` removes those of every purpose, so that the model computes as transformers
            loads it.

    Returns:
        The same model.
    """
    for each in reversed(list(PATCHES)) if purpose is None else (purpose,):
        for patch in reversed(PATCHES[each]):
            patch.remove(model)
    return model


@contextmanager
def patched(model: Any, purpose: Purpose) -> Iterator[None]:
    """Apply the patches of a purpose within the context; those that were applied before stay applied after it."""
    applied: list[Patch] = []
    try:
        applied.extend(patch for patch in PATCHES[purpose] if patch.apply(model))
        yield
    finally:
        for patch in reversed(applied):
            patch.remove(model)
