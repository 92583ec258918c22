"""How many image tokens: patch features are average-pooled before the projector."""

from dataclasses import replace

from ablations.study import CURVES, Study

STUDY = Study(
    question="How many image tokens does the language model need?",
    factor="vision.pool",
    levels={"16 tokens": 1, "4 tokens": 2, "1 token": 4},
    baseline="16 tokens",
    fixed={"projector.optimizer": "adamw", **CURVES},
    nuisance={"projector.learning_rate": [1e-3, 3e-3, 1e-2]},
    tokens=150_000,
    margin=0.02,
)

PRESETS = {
    "phi2": replace(
        STUDY,
        preset="phi2",
        levels={"576 tokens": 1, "144 tokens": 2, "64 tokens": 3, "36 tokens": 4},
        baseline="576 tokens",
        fixed={},
        nuisance={"projector.learning_rate": [3e-4, 1e-3]},
        tokens=5_000_000,
    )
}
