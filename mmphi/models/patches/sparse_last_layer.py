"""Last layer of a language model, computed only at positions with a target.

After the last attention, positions do not depend on each other. Positions without a target need only keys and values in
the last layer; their queries and MLP affect neither the loss nor any gradient. The skipped work is ten twelfths of the
layer's matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

# Position-wise modules of a layer whose outputs other positions do not need, by their names in transformers.
ATTENTIONS = ("self_attn", "self_attention", "attn", "attention")
OF_ATTENTION = ("q_proj", "o_proj", "out_proj", "dense", "c_proj")
OF_LAYER = ("mlp", "feed_forward", "fc1", "fc2")
WORTH = 0.75  # Largest share of positions for which gathering saves time.
PROBED, KEPT = 12, (3, 4, 8, 11)  # Number of test tokens, in two rows, and the positions that are compared.
TOLERANCE, TOLERANCE_ROUNDED = 1e-3, 0.1  # Relative to the standard deviation of the head's inputs.


@torch.no_grad()
def find_positionwise_modules(language_model: Any) -> list[nn.Module]:
    """Modules of a model's last layer that may skip positions, tested on a few tokens; empty if the test fails.

    Args:
        language_model: A Hugging Face causal LM.
    """
    layers = [module for module in language_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    parts = _parts(layers[-1]) if layers else []
    head = language_model.get_output_embeddings()
    if not parts or head is None:
        return []
    weight = language_model.get_input_embeddings().weight
    ids = (torch.arange(PROBED, device=weight.device) * 37 % max(2, weight.shape[0] - 1)).view(2, -1)
    kept = torch.tensor(KEPT, device=weight.device)
    seen: list[Tensor] = []
    modes = [(module, module.training) for module in language_model.modules()]
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)[kept]))
    try:
        language_model.eval()  # Dropout would make the two passes differ.
        with torch.autocast(weight.device.type, enabled=False):
            language_model(input_ids=ids, use_cache=False)
            with compute_at_positions(parts, kept):
                language_model(input_ids=ids, use_cache=False)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):  # A module needs whole rows.
        return []
    finally:
        hook.remove()
        for module, training in modes:
            module.training = training
    whole, alone = (hidden.float() for hidden in seen)
    tolerance = TOLERANCE if seen[0].dtype == torch.float32 else TOLERANCE_ROUNDED
    return parts if float((whole - alone).abs().max()) < tolerance * float(whole.std()) else []


def _parts(layer: nn.Module) -> list[nn.Module]:
    children = dict(layer.named_children())
    attentions = [children[name] for name in ATTENTIONS if name in children]
    inside = [child for each in attentions for name, child in each.named_children() if name in OF_ATTENTION]
    return inside + [children[name] for name in OF_LAYER if name in children]


@contextmanager
def compute_at_positions(parts: Sequence[nn.Module], places_K: Tensor) -> Iterator[None]:
    """Compute modules at some positions only; their outputs at the others are 0.

    Args:
        parts: Modules from (R, T, ...) to (R, T, ...), position by position.
        places_K: Positions in the flattened rows, without duplicates.
    """
    shapes: dict[nn.Module, torch.Size] = {}

    def gather(part: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = inputs
        shapes[part] = hidden.shape[:-1]
        return hidden.flatten(0, -2)[places_K][None], *rest

    def spread(part: nn.Module, _: Any, output: Tensor) -> Tensor:
        leading = shapes.pop(part)
        rows = output.new_zeros(leading.numel(), output.shape[-1])
        return rows.index_copy(0, places_K, output[0]).view(*leading, -1)

    hooks = [part.register_forward_pre_hook(gather) for part in parts]
    hooks += [part.register_forward_hook(spread) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
