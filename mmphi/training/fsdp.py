"""Parameter sharding over processes (FSDP2): full parameters exist only while a layer needs them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only


def shard_parameters(task: Any, layers: Iterable[nn.Module]) -> None:
    """Shard the parameters of a task over all processes, layer by layer (Zhao et al. 2023), in place.

    Gradients are averaged over the processes, as in DDP.

    Args:
        task: Module to train; its full parameters are available during its forward pass.
        layers: Its layers, each of which is gathered only while it is needed.
    """
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    for layer in layers:
        fully_shard(layer)
    fully_shard(task)


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter is sharded over processes."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def gather_full(tree: Any) -> Any:
    """Returns the tree with every sharded tensor gathered; must be called by all processes."""
    return tree_map_only(DTensor, lambda tensor: tensor.full_tensor(), tree)


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns a full tensor, sharded as ``like`` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def load_sharded(optimizer: torch.optim.Optimizer, state: dict[str, Any], parameters: list[Tensor]) -> None:
    """Load the full state of an optimiser, sharded as its parameters are.

    Args:
        optimizer: Optimiser to load into.
        state: Its gathered ``state_dict``.
        parameters: All parameters that it updates, in the order of its groups.
    """
    by_shape = {tuple(p.shape): p for p in parameters}

    def put(tensor: Tensor) -> Tensor:
        like = by_shape.get(tuple(tensor.shape))
        return tensor if like is None or tensor.ndim == 0 else shard_like(tensor, like)

    optimizer.load_state_dict(tree_map_only(Tensor, put, state))
