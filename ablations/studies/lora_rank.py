"""Which LoRA rank, with plain and rank-stabilised scaling, each at its own tuned learning rate."""

from dataclasses import replace

from ablations.study import Study

ADAPTER_COSTS = {
    "qlora/parameters": "parameters of the adapter",
    "seconds": "training seconds",
    "train/memory_gb": "peak memory, GB",
}
ADAPTER_QUALITY = {"val/text_loss": "loss on text, nats/token", "test/exact_match": "exact answers"}
# Validates often enough for a curve, without generated answers, which cost more than the loss.
ADAPTER_CURVES = {
    "qlora.eval_every": 50,
    "qlora.sample_images": 0,
    "evaluate.yes_no": 0,
    "evaluate.held_out_phrasings": False,
}


def rank(units: int, rslora: bool = False) -> dict[str, object]:
    """Settings of a level."""
    return {"qlora.rank": units, "qlora.rslora": rslora}


STUDY = Study(
    question="Which LoRA rank does the adapter need?",
    factor="LoRA rank",
    fields=("qlora.rank", "qlora.rslora"),
    levels={
        "rank 2": rank(2),
        "rank 4": rank(4),
        "rank 16": rank(16),
        "rank 64": rank(64),
        "rank 64, rsLoRA": rank(64, rslora=True),
    },
    baseline="rank 16",
    stage="qlora",
    seed_settings=("qlora.seed",),
    fixed=ADAPTER_CURVES,
    nuisance={"qlora.learning_rate": [2e-3, 8e-3, 3.2e-2]},
    tokens=60_000,
    margin=0.005,
    tuning_tokens=20_000,
    costs=ADAPTER_COSTS,
    also=ADAPTER_QUALITY,
    leaves_open="All adapters are trained beside one projector and one language model: how far another draw of these"
    " would move the ranks is not measured. Ranks are compared at one budget; more training may need more rank.",
)

PRESETS = {
    "phi2": replace(
        STUDY,
        preset="phi2",
        levels={f"rank {n}": rank(n) for n in (2, 4, 8, 16, 32, 64)}
        | {f"rank {n}, rsLoRA": rank(n, rslora=True) for n in (16, 64)},
        fixed={},
        nuisance={"qlora.learning_rate": [1e-4, 2e-4, 5e-4]},
        tuning_tokens=1_500_000,
        tokens=5_000_000,
    )
}
