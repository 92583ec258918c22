"""Folding of a frozen encoder's batch norms into the convolutions before them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

ALIKE = 1e-4  # Tolerance relative to the largest output: fp32 rounding over about fifty layers.


@torch.no_grad()
def fold_batch_norms(module: nn.Module, image_BCHW: Tensor) -> int:
    """Fold batch norms into the convolutions before them, which saves one pass over memory each.

    In eval mode a batch norm scales and shifts each channel, as a convolution's weights and bias can. A forward pass of
    an image finds the pairs. If the outputs differ afterwards (for instance because another module uses a convolution's
    output, too), all modules are restored. Afterwards the change cannot be undone.

    Args:
        module: Encoder in eval mode, in fp32; changed in place. Names of modules do not change, those of parameters do.
        image_BCHW: Example input.

    Returns:
        Number of folded batch norms.
    """
    pairs = _followed(module, image_BCHW)
    if not pairs:
        return 0
    expected = module(image_BCHW)
    before = [(name, module.get_submodule(name)) for pair in pairs for name in pair]
    for conv_name, norm_name in pairs:
        conv, norm = module.get_submodule(conv_name), module.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        module.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        module.set_submodule(norm_name, _rest(norm))
    if _alike(module(image_BCHW), expected):
        return len(pairs)
    for name, was in before:
        module.set_submodule(name, was)
    return 0


def _followed(module: nn.Module, image_BCHW: Tensor) -> list[tuple[str, str]]:
    """Names of convolutions and of the batch norms that receive their outputs."""
    made: dict[int, tuple[str, Tensor]] = {}  # Holds the tensors, so that their ids are not reused.
    pairs: list[tuple[str, str]] = []

    def note(name: str) -> Any:
        return lambda _, __, output: made.__setitem__(id(output), (name, output))

    def match(name: str) -> Any:
        def found(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if id(inputs[0]) in made:
                pairs.append((made[id(inputs[0])][0], name))

        return found

    hooks = []
    for name, child in module.named_modules():
        if isinstance(child, nn.Conv2d):
            hooks.append(child.register_forward_hook(note(name)))
        elif isinstance(child, nn.BatchNorm2d) and child.running_mean is not None:
            hooks.append(child.register_forward_pre_hook(match(name)))
    try:
        module(image_BCHW)
    finally:
        for hook in hooks:
            hook.remove()
    names = [name for pair in pairs for name in pair]
    return [pair for pair in pairs if all(names.count(name) == 1 for name in pair)]  # Modules used once only.


def _rest(norm: nn.BatchNorm2d) -> nn.Module:
    """What remains of a folded norm: timm's norms include dropout and activation."""
    then = [child for name in ("drop", "act") if isinstance(child := getattr(norm, name, None), nn.Module)]
    return nn.Sequential(*then) if then else nn.Identity()


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return bool((one - other).abs().max() <= ALIKE * other.abs().max())
    return len(one) == len(other) and all(_alike(a, b) for a, b in zip(one, other, strict=True))
