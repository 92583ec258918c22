"""Projector depth at equal width."""

from ablations.study import CURVES, Study

STUDY = Study(
    question="How many layers should the projector have?",
    factor="projector.layers",
    levels={"1 layer": 1, "2 layers": 2, "3 layers": 3, "4 layers": 4, "6 layers": 6},
    baseline="2 layers",
    fixed={"projector.optimizer": "adamw", **CURVES},
    nuisance={"projector.learning_rate": [1e-3, 3e-3, 1e-2]},
    tokens=60_000,
    tuning_tokens=60_000,
    margin=0.01,
)
