"""Learning rates as functions of model size, batch size and training length."""

from __future__ import annotations

import math
from typing import TypeVar

from mmphi.config.shared import TrainingSettings

S = TypeVar("S", bound=TrainingSettings)
CRITICAL_TOKENS = 2e8  # Kaplan et al. 2020, table 5: the critical batch is B*/L^(1/0.21) tokens at a loss of L nats.
CRITICAL_EXPONENT = 1 / 0.21
EARLY_LOSS = 9.8  # One nat below ln 51,200, the default end; the critical batch of longer trainings is larger.
MUON_RATE = 0.02  # Jordan et al. 2024, for updates of unit spectral norm; hardly depends on the width.
ADAMW_WITH_MUON = 0.004, 768  # AdamW's rate at a width; falls with the square root of the width: karpathy/nanochat.


def adamw_learning_rate(parameters: int, tokens: int, batch_tokens: int) -> float:
    """Returns AdamW's peak learning rate if it updates all parameters.

    ``1.79 N^-0.713 D^0.307`` for N parameters and D tokens in total, at a batch of ``0.58 D^0.571`` tokens (the step
    law of Li et al. 2025, arXiv 2503.04715). Above that batch the rate is constant, below it falls with the square root
    (Malladi et al. 2022, arXiv 2205.10287, for Adam).

    Args:
        parameters: Number of parameters without embeddings and head.
        tokens: Tokens of the whole training.
        batch_tokens: Tokens of an optimiser step.
    """
    best_batch = 0.58 * math.pow(tokens, 0.571)
    best_rate = 1.79 * math.pow(parameters, -0.713) * math.pow(tokens, 0.307)
    return best_rate * math.sqrt(min(1.0, batch_tokens / best_batch))


def muon_learning_rate(batch_tokens: int) -> float:
    """Returns Muon's peak learning rate of matrices."""
    return MUON_RATE * batch_factor(batch_tokens)


def adamw_learning_rate_with_muon(width: int, batch_tokens: int) -> float:
    """Returns AdamW's peak learning rate if Muon updates the matrices and AdamW the rest."""
    rate, at_width = ADAMW_WITH_MUON
    return rate * math.sqrt(at_width / width) * batch_factor(batch_tokens)


def batch_factor(batch_tokens: int) -> float:
    """Returns the factor on the learning rates of Muon trainings for a batch size; 1 for large batches.

    Below the critical batch it falls with the square root, above it is nearly constant (McCandlish et al. 2018, arXiv
    1812.06162, equation 2.8 with exponent 1/2, as for Adam).
    """
    critical = CRITICAL_TOKENS / EARLY_LOSS**CRITICAL_EXPONENT
    return 1 / math.sqrt(1 + critical / batch_tokens)


def with_learning_rates(settings: S, parameters: int, width: int, batch_tokens: int) -> S:
    """Returns the settings with learning rates of 0 replaced by the rules'; ``steps`` is the whole training."""
    changes = {}
    if not settings.learning_rate:
        with_muon = settings.optimizer == "muon"
        tokens = settings.steps * batch_tokens
        rate = (
            adamw_learning_rate_with_muon(width, batch_tokens)
            if with_muon
            else adamw_learning_rate(parameters, tokens, batch_tokens)
        )
        changes["learning_rate"] = rate
    if not settings.muon_learning_rate:
        changes["muon_learning_rate"] = muon_learning_rate(batch_tokens)
    return settings.model_copy(update=changes)
