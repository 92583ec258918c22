"""torch.compile for the layers of a language model, during training only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from mmphi.models.language.packing_check import probe_rows
from mmphi.models.packed_vlm import PackedVLM

LEAST_STEPS = 100  # Compiling takes some seconds; a compiled step is a sixth shorter.
CompileSetting = Literal["auto", "yes", "no"]


def should_compile(setting: CompileSetting, packed: PackedVLM, steps: int) -> bool:
    """Whether to compile; ``auto`` compiles where it was measured to be faster.

    Args:
        setting: Value of the setting.
        packed: Model that is trained.
        steps: Number of training steps.
    """
    if setting != "auto":
        return setting == "yes"
    quantised = getattr(packed.language_model, "is_quantized", False)
    on_gpu = next(packed.language_model.parameters()).is_cuda
    return on_gpu and packed.frozen and packed.rounded and not quantised and steps >= LEAST_STEPS


@contextmanager
def compiled_layers(packed: PackedVLM, wanted: bool, say: Callable[[str], None]) -> Iterator[None]:
    """Compile a language model's layers for training, within the context; without a working compiler, do nothing.

    One compilation serves all layers and lengths. Validation and generation use the uncompiled layers, because their
    shapes change with every token.

    Args:
        packed: Packed model whose layers are compiled.
        wanted: Whether to compile.
        say: Called with a message if compilation fails.
    """
    if wanted:
        layers = [m for m in packed.language_model.modules() if isinstance(m, GradientCheckpointingLayer)]
        packed.compiled = [(layer, torch.compile(layer._call_impl, dynamic=True)) for layer in layers]
        try:
            _smoke_test(packed)
        except Exception as problem:  # Tool chains fail in many ways; torch has no common base class.
            lines = [line for line in str(problem).split("\n") if line.strip()] or [type(problem).__name__]
            say(f"torch.compile does not work here ({lines[0][:120]}): continuing without it")
            packed.compiled = []
    try:
        yield
    finally:
        packed.compiled = []


def _smoke_test(packed: PackedVLM) -> None:
    """Run one forward and backward pass and discard the gradients; passes on any exception."""
    training = packed.training
    weight = packed.language_model.get_input_embeddings().weight
    try:
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            packed.train()(**probe_rows(weight)).backward()
    finally:
        packed.zero_grad()
        packed.train(training)
