"""torch's Muon, with an orthogonalisation that is fast on CPUs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Approximate the nearest orthogonal matrix by the quintic Newton-Schulz iteration, in the matrix's precision.

    The same as in ``torch.optim.Muon`` (Jordan et al. 2024), which rounds to bf16 first.

    Args:
        matrix: Matrix (rows, columns).
        coefficients: Coefficients of the first, third and fifth power.
        steps: Number of iterations.
        eps: Lower limit of the norm by which the matrix is divided.
    """
    a, b, c = coefficients
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


class Muon(torch.optim.Muon):
    """torch's Muon; updates of CPU parameters are orthogonalised in the parameters' precision.

    Without AVX512-BF16 a CPU multiplies bf16 matrices about ten times slower than fp32 ones, which dominated the steps
    of small models. State and settings are those of ``torch.optim.Muon``.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters."""
        if any(p.device.type != "cpu" for group in self.param_groups for p in group["params"]):
            return super().step(closure)  # type: ignore[no-untyped-call]  # torch does not type it.
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, state, rate = parameter.grad, self.state[parameter], float(group["lr"])
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        update = newton_schulz(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = parameter.shape
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter.add_(update, alpha=-rate * math.sqrt(max(1.0, rows / columns)))
