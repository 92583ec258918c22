"""A search for projector settings, pruned over paired seeds."""

from ablations.search import Range, Search
from ablations.study import CURVES

STUDY = Search(
    question="Which learning rate, depth and width should a projector begin with?",
    space={
        "projector.learning_rate": Range(3e-4, 3e-2, log=True),
        "projector.layers": Range(1, 4),
        "projector.width": [128, 256, 512],
    },
    trials=20,
    fixed={"projector.optimizer": "adamw", **CURVES},
    tokens=60_000,
)
