"""Which vision encoder: light CLIPs trained by mmphi with preset `tiny`, published CLIPs with preset `phi2`."""

from dataclasses import replace

from ablations.study import CURVES, Study

STUDY = Study(
    question="Which light CLIP gives the projector the most to read?",
    factor="CLIP variant",
    fields=("light_clip.from_nothing", "light_clip.width", "vision.pool"),
    levels={
        "ResNet 32": {"light_clip.from_nothing": "resnet", "light_clip.width": 32},
        "ResNet 64": {"light_clip.from_nothing": "resnet", "light_clip.width": 64},
        "ResNet 96": {"light_clip.from_nothing": "resnet", "light_clip.width": 96},
        "ViT 64": {"light_clip.from_nothing": "vit", "light_clip.width": 64, "vision.pool": 2},  # 16 tokens, too
    },
    baseline="ResNet 64",
    seed_settings=("projector.seed", "light_clip.seed"),  # Every seed trains its own CLIP.
    fixed={
        "projector.optimizer": "adamw",
        **CURVES,
        "light_clip.steps": 200,
        "light_clip.workers": 0,
        "embed.workers": 0,
    },
    nuisance={"projector.learning_rate": [1e-3, 3e-3]},
    tokens=60_000,
    margin=0.02,
    leaves_open="All light CLIPs train for the same number of steps at the same learning rate: a kind that needs more"
    " of either is judged at what it reaches with these.",
)

OPEN_CLIP = {
    "ViT-B-32": "laion2b_s34b_b79k",
    "ViT-B-16": "laion2b_s34b_b88k",
    "ViT-L-14-336": "openai",
    "MobileCLIP2-S0": "dfndr2b",
    "MobileCLIP2-S2": "dfndr2b",
    "ViT-SO400M-14-SigLIP2": "webli",
}
PRESETS = {
    "phi2": replace(
        STUDY,
        question="Which published CLIP gives the projector the most to read?",
        preset="phi2",
        fields=("vision.model", "vision.pretrained"),
        levels={name: {"vision.model": name, "vision.pretrained": tag} for name, tag in OPEN_CLIP.items()},
        baseline="ViT-L-14-336",
        seed_settings=("projector.seed",),
        fixed={},
        nuisance={"projector.learning_rate": [3e-4, 1e-3]},
        tokens=5_000_000,
        leaves_open="Each level is one published set of weights: what is measured is these weights, not their"
        " architecture, and how far another training of the same encoder would differ stays open.",
    )
}
