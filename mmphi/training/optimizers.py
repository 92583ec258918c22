"""Optimisers besides the Trainer's own: AdamW with groups, and Muon for matrices with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmphi.training.muon import Muon


def grouped_adamw(
    groups: Sequence[tuple[Sequence[nn.Parameter], float]], *, weight_decay: float, beta2: float, paged: bool = False
) -> torch.optim.Optimizer:
    """Returns AdamW with a separate learning rate for each group of parameters.

    Args:
        groups: Parameters and peak learning rate of each group; empty groups are left out.
        weight_decay: Weight decay of matrices; other parameters have none.
        beta2: Second decay rate.
        paged: Whether the state is paged between GPU and CPU memory (bitsandbytes); no effect without a GPU.
    """
    given: list[dict[str, Any]] = []
    for parameters, rate in groups:
        for matrices in (True, False):
            chosen = [p for p in parameters if (p.ndim > 1) == matrices]
            if chosen:
                given.append({"params": chosen, "lr": rate, "weight_decay": weight_decay if matrices else 0.0})
    if paged and torch.cuda.is_available():
        from bitsandbytes.optim import PagedAdamW32bit

        optimizer: torch.optim.Optimizer = PagedAdamW32bit(given, betas=(0.9, beta2))
        return optimizer
    return torch.optim.AdamW(given, betas=(0.9, beta2), fused=True)


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon (Jordan et al. 2024) on the matrices inside a model, AdamW on everything else.

    AdamW updates embeddings and the output head: Muon is for matrices that map hidden states to hidden states. A
    convolution kernel is treated as a matrix from its receptive field to its output channels, as by Jordan et al.

    Args:
        model: Module to train; frozen parameters are left out. Its optional method ``ends`` returns the names of
            further input and output parameters.
        learning_rate: Learning rate of AdamW.
        muon_learning_rate: Learning rate of Muon, for updates of unit spectral norm scaled by
            ``sqrt(max(1, rows / columns))``.
        beta2: AdamW's second decay rate.
        weight_decay: Weight decay of the matrices that Muon updates; AdamW has none.

    Attributes:
        matrices: Names of the parameters that Muon updates.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float,
        muon_learning_rate: float,
        beta2: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        outer = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        for module in model.modules():
            head_of: Any = getattr(module, "get_output_embeddings", None)
            head = head_of() if head_of is not None else None
            outer |= {id(p) for p in head.parameters()} if head is not None else set()
        ends_of: Any = getattr(model, "ends", tuple)
        ends = set(ends_of())
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        inner = {n: p for n, p in trained.items() if p.ndim in (2, 4) and id(p) not in outer and n not in ends}
        self.matrices = list(inner)
        self._kernels = [(p, nn.Parameter(_flat(p.detach(), p))) for p in inner.values() if p.ndim == 4]
        matrices = [p for p in inner.values() if p.ndim == 2] + [matrix for _, matrix in self._kernels]
        rest = [p for name, p in trained.items() if name not in inner]
        self.muon: Any = Muon(matrices, lr=muon_learning_rate, weight_decay=weight_decay, momentum=0.95)
        self.adamw = torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, beta2), weight_decay=0.0, fused=True)
        super().__init__([{"params": matrices}, {"params": rest}], {})
        self._share()

    def _share(self) -> None:
        """Expose the groups of both optimisers, so that schedulers change their learning rates."""
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for kernel, matrix in self._kernels:
            matrix.grad = None if kernel.grad is None else _flat(kernel.grad, kernel)
        self.muon.step()
        self.adamw.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.muon.zero_grad(set_to_none)
        for kernel, _ in self._kernels:
            kernel.grad = None
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of both optimisers."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of both optimisers."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self._share()


def _flat(tensor: Tensor, kernel: Tensor) -> Tensor:
    """Returns a kernel (out, in, height, width), or its gradient, as a matrix of ``out`` rows in the kernel's order.

    For the kernel itself the matrix is a view, in channels-first and channels-last layout.
    """
    return (tensor if kernel.is_contiguous() else tensor.permute(0, 2, 3, 1)).reshape(len(tensor), -1)
