"""Ten seconds of what is no voice."""

from __future__ import annotations

import numpy as np

from mmphi.data.audio import RATE

SECONDS = np.arange(10 * RATE) / RATE


def chords() -> np.ndarray:
    """Four struck chords over and over, with harmonics that die away."""
    out, beat = np.zeros(len(SECONDS)), RATE // 2
    for number in range(len(out) // beat):
        root, since = (262, 220, 175, 196)[number % 4], SECONDS[:beat]
        struck = sum(np.sin(2 * np.pi * root * k * h * since) / h for k in (1, 1.26, 1.5, 2) for h in (1, 2, 3))
        out[number * beat : (number + 1) * beat] = 0.15 * np.exp(-3 * since) * struck
    return out


NOISE = np.random.default_rng(0).normal(0, 1, len(SECONDS))
