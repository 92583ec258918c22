"""Learning rates that follow the size of a model and of its batch."""

from __future__ import annotations

import math
from typing import TypeVar

from mmphi.settings.shared import TrainingSettings

S = TypeVar("S", bound=TrainingSettings)
CRITICAL_TOKENS = 2e8  # Kaplan et al. 2020, table 5: the critical batch is B*/L^(1/0.21) tokens at a loss of L nats.
CRITICAL_EXPONENT = 1 / 0.21
EARLY_LOSS = 9.8  # One nat below ln 51,200, where trainings end by default; what goes on takes larger batches.
MUON_RATE = 0.02  # Jordan et al. 2024, for updates of unit spectral norm; it hardly depends on the width.
BESIDE_MUON = 0.004, 768  # Of embeddings and head, falling with the square root of the width: karpathy/nanochat.


def adamw_rate(parameters: int, batch_tokens: int) -> float:
    """AdamW's peak learning rate where it updates everything.

    Size: ``0.003239 - 0.0001395 ln(N)`` (Kaplan et al. 2020, arXiv 2001.08361, equation D.1; N without embeddings),
    measured at batches of half a million tokens, far above the critical one. Batch: :func:`batch_factor`.

    Args:
        parameters: Without embeddings and head.
        batch_tokens: Tokens of an optimiser step.
    """
    return max(1e-4, 0.003239 - 0.0001395 * math.log(parameters)) * batch_factor(batch_tokens)


def muon_rate(batch_tokens: int) -> float:
    """Muon's peak learning rate, of matrices."""
    return MUON_RATE * batch_factor(batch_tokens)


def rate_beside_muon(width: int, batch_tokens: int) -> float:
    """AdamW's peak learning rate where Muon updates the matrices, and it the rest."""
    rate, at_width = BESIDE_MUON
    return rate * math.sqrt(at_width / width) * batch_factor(batch_tokens)


def batch_factor(batch_tokens: int) -> float:
    """What is left of a learning rate at a batch of so many tokens, 1 for a large one.

    Below the critical batch it falls with the square root, above it is flat (McCandlish et al. 2018, arXiv 1812.06162,
    equation 2.8 with exponent 1/2, as Adam has it).
    """
    critical = CRITICAL_TOKENS / EARLY_LOSS**CRITICAL_EXPONENT
    return 1 / math.sqrt(1 + critical / batch_tokens)


def rated(settings: S, parameters: int, width: int, batch_tokens: int) -> S:
    """The same settings with the learning rates that they leave to the rule filled in."""
    changes = {}
    if not settings.learning_rate:
        beside = settings.optimizer == "muon"
        rate = rate_beside_muon(width, batch_tokens) if beside else adamw_rate(parameters, batch_tokens)
        changes["learning_rate"] = rate
    if not settings.muon_learning_rate:
        changes["muon_learning_rate"] = muon_rate(batch_tokens)
    return settings.model_copy(update=changes)
