"""A search for the Pareto front of projector size and validation loss."""

from ablations.search import Range, Search
from ablations.study import CURVES

STUDY = Search(
    question="How small may a projector be for how much loss?",
    space={
        "projector.learning_rate": Range(1e-3, 3e-2, log=True),
        "projector.layers": Range(1, 3),
        "projector.width": Range(16, 512, log=True),
    },
    objectives={"val/loss": "minimize", "projector/parameters": "minimize"},
    trials=24,
    seeds=(0,),
    sampler="nsga2",
    pruner="",
    fixed={"projector.optimizer": "adamw", **CURVES},
    tokens=60_000,
)
