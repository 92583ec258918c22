"""Which projector kind, at equal parameters and, except for the MLP without pooling, at equal image tokens."""

from dataclasses import replace

from ablations.study import CURVES, Study

STUDY = Study(
    question="Which kind of projector reads an image best, if its size is given?",
    factor="projector kind",
    fields=("projector.kind", "projector.merge", "projector.queries", "projector.layers", "vision.pool"),
    levels={
        "MLP, all tokens": {"projector.kind": "mlp"},
        "MLP, averaged": {"projector.kind": "mlp", "vision.pool": 2},
        "pixel shuffle": {"projector.kind": "pixel_shuffle", "projector.merge": 2},
        "LDPv2": {"projector.kind": "ldp_v2", "projector.merge": 2},
        "resampler": {"projector.kind": "resampler", "projector.queries": 4, "projector.layers": 1},
    },
    baseline="MLP, averaged",
    fixed={"projector.optimizer": "adamw", "projector.parameters": 400_000, **CURVES},
    nuisance={"projector.learning_rate": [1e-3, 3e-3, 1e-2]},
    tokens=60_000,
    tuning_tokens=60_000,
    margin=0.02,
    leaves_open="The budget is counted in supervised tokens: a kind with fewer image tokens takes less time for it.",
)

PRESETS = {
    "phi2": replace(
        STUDY,
        preset="phi2",
        levels={
            "MLP, averaged": {"projector.kind": "mlp", "vision.pool": 2},
            "pixel shuffle": {"projector.kind": "pixel_shuffle", "projector.merge": 2, "vision.pool": 1},
            "LDPv2": {"projector.kind": "ldp_v2", "projector.merge": 2, "vision.pool": 1},
            "resampler": {"projector.kind": "resampler", "projector.queries": 144, "vision.pool": 1},
        },
        fixed={"projector.parameters": 20_000_000},
        nuisance={"projector.learning_rate": [3e-4, 1e-3]},
        tokens=5_000_000,
    )
}
