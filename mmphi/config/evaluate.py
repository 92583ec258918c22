"""The section of the stage ``evaluate``."""

from __future__ import annotations

from typing import Literal

from mmphi.config.section import Section, setting


class EvaluateSettings(Section):
    """How answers are measured."""

    model: str = setting(
        "", "folder, run or registered name of the model; empty takes that of `stage` with these settings", file="model"
    )
    stage: Literal["projector", "qlora", "merge", "speech"] = setting(
        "projector", "stage whose model is measured if `model` is empty"
    )
    split: Literal["train", "validation", "test"] = setting("test", "data split to measure on")
    seed: int = setting(0, "seed of samples, questions and shuffles", ge=0)
    max_images: int = setting(200, "at most this many images, or recordings; 0 takes all", unit="images", ge=0)
    max_new_tokens: int = setting(48, "maximum length of an answer", unit="tokens", ge=1)
    batch_size: int = setting(32, "answers generated at once", unit="answers", affects_key=False, ge=1)
    checkpoint: str = setting("final", "final, or the step of a kept checkpoint")
    yes_no: int = setting(200, "POPE-style yes/no questions; 0 asks none", unit="questions", ge=0)
    held_out_phrasings: bool = setting(
        True,
        "ask the captions of scenes and the yes/no questions a second time, in phrasings that no training contains",
        legacy_default=False,
    )
    long_answers: int = setting(100, "long answers of each kind (conversation, ...); 0 none", unit="answers", ge=0)
    max_answer_tokens: int = setting(512, "maximum length of a long answer", unit="tokens", ge=1)
    candidates: int = setting(1, "captions sampled per image; the consensus caption is used; 1 is greedy", ge=1)
    temperature: float = setting(0.5, "sampling temperature of caption candidates", gt=0)
    audio_inputs: list[Literal["encoder", "transcript", "soft"]] = setting(
        [],
        "audio inputs to measure for a model that takes audio; empty uses the one it was trained for",
        formerly="links",
    )
