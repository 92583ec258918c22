"""Learning rates that follow the size of a model, of its batch and of its training."""

from __future__ import annotations

import math
from typing import TypeVar

from mmphi.config.shared import TrainingSettings

S = TypeVar("S", bound=TrainingSettings)
CRITICAL_TOKENS = 2e8  # Kaplan et al. 2020, table 5: the critical batch is B*/L^(1/0.21) tokens at a loss of L nats.
CRITICAL_EXPONENT = 1 / 0.21
EARLY_LOSS = 9.8  # One nat below ln 51,200, where trainings end by default; what goes on takes larger batches.
MUON_RATE = 0.02  # Jordan et al. 2024, for updates of unit spectral norm; it hardly depends on the width.
BESIDE_MUON = 0.004, 768  # Of embeddings and head, falling with the square root of the width: karpathy/nanochat.


def adamw_learning_rate(parameters: int, tokens: int, batch_tokens: int) -> float:
    """AdamW's peak learning rate where it updates everything.

    ``1.79 N^-0.713 D^0.307`` for N parameters and D tokens in all, at a batch of ``0.58 D^0.571`` tokens (the step law
    of Li et al. 2025, arXiv 2503.04715). Above that batch it is flat, below it falls with the square root
    (Malladi et al. 2022, arXiv 2205.10287, for Adam).

    Args:
        parameters: Without embeddings and head.
        tokens: Of the whole training.
        batch_tokens: Tokens of an optimiser step.
    """
    best_batch = 0.58 * math.pow(tokens, 0.571)
    best_rate = 1.79 * math.pow(parameters, -0.713) * math.pow(tokens, 0.307)
    return best_rate * math.sqrt(min(1.0, batch_tokens / best_batch))


def muon_learning_rate(batch_tokens: int) -> float:
    """Muon's peak learning rate, of matrices."""
    return MUON_RATE * batch_factor(batch_tokens)


def adamw_learning_rate_with_muon(width: int, batch_tokens: int) -> float:
    """AdamW's peak learning rate where Muon updates the matrices, and it the rest."""
    rate, at_width = BESIDE_MUON
    return rate * math.sqrt(at_width / width) * batch_factor(batch_tokens)


def batch_factor(batch_tokens: int) -> float:
    """What is left of Muon's learning rates at a batch of so many tokens, 1 for a large one.

    Below the critical batch it falls with the square root, above it is flat (McCandlish et al. 2018, arXiv 1812.06162,
    equation 2.8 with exponent 1/2, as Adam has it).
    """
    critical = CRITICAL_TOKENS / EARLY_LOSS**CRITICAL_EXPONENT
    return 1 / math.sqrt(1 + critical / batch_tokens)


def with_learning_rates(settings: S, parameters: int, width: int, batch_tokens: int) -> S:
    """The same settings, whose steps are all there are, with the learning rates filled in that they leave to a rule."""
    changes = {}
    if not settings.learning_rate:
        beside = settings.optimizer == "muon"
        tokens = settings.steps * batch_tokens
        rate = (
            adamw_learning_rate_with_muon(width, batch_tokens)
            if beside
            else adamw_learning_rate(parameters, tokens, batch_tokens)
        )
        changes["learning_rate"] = rate
    if not settings.muon_learning_rate:
        changes["muon_learning_rate"] = muon_learning_rate(batch_tokens)
    return settings.model_copy(update=changes)
