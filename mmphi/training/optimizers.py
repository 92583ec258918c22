"""What updates the weights beyond the Trainer's own: AdamW in groups, and Muon for matrices with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmphi.training.muon import Muon


def grouped_adamw(
    groups: Sequence[tuple[Sequence[nn.Parameter], float]], *, weight_decay: float, beta2: float, paged: bool = False
) -> torch.optim.Optimizer:
    """AdamW with a learning rate of its own for each group of parameters.

    Args:
        groups: Parameters and their peak learning rate; empty ones are left out.
        weight_decay: Of matrices.
        beta2: The second decay rate.
        paged: Keep the state in memory that moves between GPU and CPU as it is needed (bitsandbytes).
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

    Embeddings and the output head count as the rest: Muon is for matrices that map hidden states to hidden states. A
    convolution's kernel is a matrix from all that it sees to its channels, as Jordan has it.

    Args:
        model: What is trained; parameters without gradients are left out. Its ``ends()``, if it has that, are names of
            more that is at its beginning or end.
        learning_rate: Of AdamW.
        muon_learning_rate: Of Muon, for updates of unit spectral norm scaled by ``sqrt(max(1, rows / columns))``.
        beta2: AdamW's second decay rate.
        weight_decay: Of all matrices but embeddings.

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
        """Let whoever changes learning rates here change them there."""
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
        """Forget the gradients."""
        self.muon.zero_grad(set_to_none)
        for kernel, _ in self._kernels:
            kernel.grad = None
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state of both."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of both back."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self._share()


def _flat(tensor: Tensor, kernel: Tensor) -> Tensor:
    """A kernel (out, in, height, width), or its gradient, as a matrix of ``out`` rows in the order that the kernel has.

    Of the kernel itself it is the same memory, whether its channels come first or last.
    """
    return (tensor if kernel.is_contiguous() else tensor.permute(0, 2, 3, 1)).reshape(len(tensor), -1)
