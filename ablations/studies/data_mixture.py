"""Which mixture of captions, questions and text-only examples to train an adapter on, and what it forgets."""

from dataclasses import replace

from ablations.studies.lora_rank import ADAPTER_COSTS, ADAPTER_CURVES, ADAPTER_QUALITY
from ablations.study import Study

QUESTIONS = "parts=1, questions=1, yes_no=1"

STUDY = Study(
    question="Which mixture of captions, questions and text should an adapter be trained on?",
    factor="qlora.mixture",
    levels={
        "captions": "caption=1",
        "questions": QUESTIONS,
        "captions and questions": f"caption=1, {QUESTIONS}",
        "captions, questions, a fifth text": f"caption=1, {QUESTIONS}, text=1",
        "captions, questions, half text": f"caption=1, {QUESTIONS}, text=4",
    },
    baseline="captions and questions",
    stage="qlora",
    seed_settings=("qlora.seed",),
    fixed=ADAPTER_CURVES | {"qlora.learning_rate": 8e-3},
    tokens=60_000,
    margin=0.005,
    costs=ADAPTER_COSTS,
    also=ADAPTER_QUALITY,
    leaves_open="The test holds captions and questions alike, as the baseline's mixture does. What is forgotten is"
    " measured on the text that the language model was made from, which is narrow on drawn scenes.",
)

PRESETS = {
    "phi2": replace(
        STUDY,
        preset="phi2",
        levels={
            "conversations": "conversation=1",
            "conversations and details": "conversation=1, detail=1",
            "all three": "conversation=1, detail=1, reasoning=1",
        },
        baseline="all three",
        fixed={},
        tokens=5_000_000,
    )
}
