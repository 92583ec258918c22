"""Correction for looking at a study before its end.

A study that is judged at 8, 12 and 16 seeds, and stopped when it shows something, is wrong more often than one that is
judged once. Its p values are corrected to be the chance that *any* of the declared looks would have given so small a
one, were there no difference (Pocock's design, with the sign-flip test in place of the normal one).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from reports.power import p_values

DRAWS = 20_000


def correct_for_looks(p: float, looks: Sequence[int]) -> float:
    """A p value corrected for the looks that a study declares.

    Args:
        p: Of the sign-flip test at one of the looks.
        looks: Numbers of seeds, the last one included, whether looked at or not.
    """
    if len(looks) < 2 or p >= 1:
        return p
    return max(p, float(np.mean(_smallest(tuple(looks)) <= p * (1 + 1e-9))))


@lru_cache(64)
def _smallest(looks: tuple[int, ...]) -> NDArray[np.float64]:
    """The smallest p over the looks, of simulated studies without a difference, shape (studies,)."""
    drawn = np.random.default_rng(0).normal(size=(DRAWS, max(looks)))
    return np.asarray(np.min([p_values(drawn[:, :look]) for look in looks], axis=0))


def looks_reached(ended: int, looks: Sequence[int]) -> int | None:
    """The last look that a study has come to; nothing before the first one.

    Args:
        ended: Seeds at which all is done.
        looks: Numbers of seeds, the last one included.
    """
    return max((look for look in looks if look <= ended), default=None)
