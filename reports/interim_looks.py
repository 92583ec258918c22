"""Correction of p values for interim looks.

A study that is judged at 8, 12 and 16 seeds, and stopped at the first difference, has more false positives than one
that is judged once. The corrected p value is the probability that *any* of the declared looks gives a p value this
small without a true difference (Pocock's design, with the sign-flip test instead of the normal test).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from reports.power import p_values

DRAWS = 20_000


def correct_for_looks(p: float, looks: Sequence[int]) -> float:
    """P value corrected for the declared looks of a study; unchanged for fewer than two looks.

    Args:
        p: P value of :func:`reports.paired_tests.combined_p` at one of the looks.
        looks: Numbers of seeds of all declared looks, including the final one.
    """
    if len(looks) < 2 or p >= 1:
        return p
    return max(p, float(np.mean(_smallest(tuple(looks)) <= p * (1 + 1e-9))))


@lru_cache(64)
def _smallest(looks: tuple[int, ...]) -> NDArray[np.float64]:
    """Smallest p over the looks of simulated studies without a difference, shape (studies,)."""
    drawn = np.random.default_rng(0).normal(size=(DRAWS, max(looks)))
    return np.asarray(np.min([p_values(drawn[:, :look]) for look in looks], axis=0))


def looks_reached(ended: int, looks: Sequence[int]) -> int | None:
    """The last look that a study has reached; ``None`` before the first one.

    Args:
        ended: Number of leading seeds at which all trials have ended.
        looks: Numbers of seeds of all looks, including the final one.
    """
    return max((look for look in looks if look <= ended), default=None)
