"""A custom study: mmphi ablate examples/own_study.py, then mmphi report --study own_study."""

from ablations.study import Study

STUDY = Study(
    question="Which activation should stand between the layers of the projector?",
    factor="projector.activation",
    levels={"gelu": "gelu", "relu": "relu", "silu": "silu"},
    baseline="gelu",
    # The learning rate that is tuned below is AdamW's. The preset `tiny` trains the projector's matrices with Muon,
    # which does not use it, and a study that tunes a setting without effect is refused.
    fixed={"projector.optimizer": "adamw"},
    nuisance={"projector.learning_rate": [1e-3, 3e-3]},  # Extended while the best value is at an end of the range.
    tokens=150_000,  # Supervised tokens per trial.
    margin=0.01,  # Smallest relevant difference, in nats per token.
)
