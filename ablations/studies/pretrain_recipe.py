"""Why the original pretraining failed, at small scale: its learning rate and batch size against recipes that learn."""

from ablations.study import Study

RECIPE = (
    "optimizer",
    "learning_rate",
    "lr_scheduler",
    "warmup_ratio",
    "beta2",
    "weight_decay",
    "batch_tokens",
    "context",
)
ORIGINAL = {"optimizer": "adamw", "learning_rate": 6e-3, "lr_scheduler": "cosine", "warmup_ratio": 0.1, "beta2": 0.95}
RULE = {"optimizer": "adamw", "learning_rate": 0.0, "lr_scheduler": "wsd", "warmup_ratio": 0.02, "beta2": 0.95}


def recipe(**changes: object) -> dict[str, object]:
    """Settings of the section ``pretrain``."""
    return {f"pretrain.{name}": value for name, value in changes.items()}


STUDY = Study(
    question="Why did the original pretraining stay at 7 to 8 nats, and what does not?",
    factor="recipe",
    fields=tuple(f"pretrain.{name}" for name in RECIPE),
    levels={
        "the original run": recipe(**ORIGINAL, weight_decay=0.1, batch_tokens=512, context=512),
        "its rate, a batch 4 times larger": recipe(**ORIGINAL, weight_decay=0.1, batch_tokens=2048, context=512),
        "AdamW by the rule": recipe(**RULE, weight_decay=0.1, batch_tokens=2048, context=512),
        "Muon by the rule": recipe(**RULE | {"optimizer": "muon"}, weight_decay=0.1, batch_tokens=2048, context=512),
    },
    baseline="the original run",
    preset="text",
    stage="pretrain",
    fixed={
        "corpus.sources": '["${MMPHI_TEXT}"]',
        "pretrain.size": "1M",
        "pretrain.eval_every": 1000,
        "pretrain.prompts": "[]",
        "pretrain.validation_tokens": 16384,
    },
    tokens=200_000,
    seeds=7,
    seed_settings=("pretrain.seed",),
    metric="val/loss",
    margin=0.05,
    costs={"seconds": "training seconds", "train/memory_gb": "peak memory, GB", "pretrain/parameters": "parameters"},
    leaves_open="The original run's batch is not in its log: 512 tokens stand for it, and a tenth of the training for"
    " its 500 updates of warm-up. The model is smaller than the original's, and the budget far smaller.",
)
