"""The last layer of a language model, computed only where something is predicted.

After the last attention no position sees another one. What a position that predicts nothing asks of it, and what the
layer's MLP makes of the answer, goes nowhere: neither into the loss nor, by a gradient, into anything that is trained.
Its keys and values do. Of a layer's matrices that is all but two parts of twelve.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

# Parts of a layer that read each position by itself, and give nothing to other positions, as transformers names them.
ATTENTIONS = ("self_attn", "self_attention", "attn", "attention")
OF_ATTENTION = ("q_proj", "o_proj", "out_proj", "dense", "c_proj")
OF_LAYER = ("mlp", "feed_forward", "fc1", "fc2")
WORTH = 0.75  # Share of positions up to which gathering them pays.
PROBED, KEPT = 12, (3, 4, 8, 11)  # Tokens that it is tried with, in two rows, and those of them that are looked at.
TOLERANCE, TOLERANCE_ROUNDED = 1e-3, 0.1  # Of the spread of what the head is given.


@torch.no_grad()
def find_positionwise_modules(language_model: Any) -> list[nn.Module]:
    """The parts of a model's last layer that may leave positions out, tried with some tokens; none where it is unsure.

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
        language_model.eval()  # Nothing drops while the two are held against each other.
        with torch.autocast(weight.device.type, enabled=False):
            language_model(input_ids=ids, use_cache=False)
            with compute_at_positions(parts, kept):
                language_model(input_ids=ids, use_cache=False)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):  # It has parts that want whole rows.
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
    """Let parts of a layer compute some positions only; what they say of the others is 0.

    Args:
        parts: Each from (R, T, ...) to (R, T, ...), position by position.
        places_K: Which, in the flattened rows, each once.
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
