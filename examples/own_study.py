"""A study of your own: mmphi ablate examples/own_study.py, then mmphi report --study own_study."""

from ablations.study import Study

STUDY = Study(
    question="Which activation should stand between the layers of the projector?",
    factor="projector.activation",
    levels={"gelu": "gelu", "relu": "relu", "silu": "silu"},
    baseline="gelu",
    fixed={"projector.optimizer": "adamw"},
    nuisance={"projector.learning_rate": [1e-3, 3e-3]},  # Extended while the best value lies at an end.
    tokens=150_000,  # Supervised tokens that a trial learns from.
    margin=0.01,  # Nats per token that would matter to anybody.
)
