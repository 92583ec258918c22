"""torch's compiler for the layers of a language model that is lent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from mmphi.models.language.packing_check import probe_rows
from mmphi.models.packed_vlm import PackedVLM

LEAST_STEPS = 100  # Compiling takes some seconds, of which a step saves a sixth of its own.
Asked = Literal["auto", "yes", "no"]


def should_compile(asked: Asked, packed: PackedVLM, steps: int) -> bool:
    """Whether to compile: where it was measured to be faster, if that is left open.

    Args:
        asked: What the settings say.
        packed: What is trained.
        steps: How long.
    """
    if asked != "auto":
        return asked == "yes"
    quantised = getattr(packed.language_model, "is_quantized", False)
    on_gpu = next(packed.language_model.parameters()).is_cuda
    return on_gpu and packed.frozen and packed.rounded and not quantised and steps >= LEAST_STEPS


@contextmanager
def compiled_layers(packed: PackedVLM, wanted: bool, say: Callable[[str], None]) -> Iterator[None]:
    """Let torch compile a language model's layers for training, until the end; told where it cannot.

    A layer is compiled once for all of them and for all lengths. Validation and answers go on as before: their shapes
    are others at every token.

    Args:
        packed: Whose language model it is.
        wanted: Whether to.
        say: Told if it does not work here.
    """
    if wanted:
        layers = [m for m in packed.language_model.modules() if isinstance(m, GradientCheckpointingLayer)]
        packed.compiled = [(layer, torch.compile(layer._call_impl, dynamic=True)) for layer in layers]
        try:
            _smoke_test(packed)
        except Exception as problem:  # Whatever a compiler's tool chain may lack; torch names no common ancestor.
            lines = [line for line in str(problem).split("\n") if line.strip()] or [type(problem).__name__]
            say(f"torch.compile does not work here ({lines[0][:120]}): continuing without it")
            packed.compiled = []
    try:
        yield
    finally:
        packed.compiled = []


def _smoke_test(packed: PackedVLM) -> None:
    """One step forward and backward, whose gradients are forgotten; raises whatever goes wrong."""
    training = packed.training
    weight = packed.language_model.get_input_embeddings().weight
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        packed.train()(**probe_rows(weight)).backward()
    packed.zero_grad()
    packed.train(training)
