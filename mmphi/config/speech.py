"""The sections of recordings, and of the projector between recordings and a language model."""

from __future__ import annotations

from typing import Literal

from mmphi.config.section import Section, setting
from mmphi.config.shared import TrainingSettings


class RecordingsSection(Section):
    """Recordings and their transcripts."""

    path: str = setting("", "CSV of recordings, with a header", file="path")
    recordings: str = setting("", "folder that their paths are relative to; empty takes that of the CSV", file="path")
    audio_column: str = setting("audio", "column of the recording")
    text_column: str = setting("transcript", "column of the transcript")
    answer_column: str = setting("answer", "column of the answer; without it, the answer is the transcript")
    context_column: str = setting("context", "column of a text that the question is about; may be missing")
    max_bad_share: float = setting(
        0.05, "stop where more recordings than this share are unusable", affects_key=False, ge=0, le=1
    )


class SpeechSettings(TrainingSettings, RecordingsSection):
    """The projector between recordings and the frozen language model, trained by distillation."""

    audio_input: Literal["encoder", "transcript", "soft"] = setting(
        "encoder", "encoder frames of Whisper, its transcript, or its token probabilities (soft)", formerly="link"
    )
    model: str = setting(
        "", "folder or run of a model that is to take audio; empty takes the language model alone", file="model"
    )
    features: Literal["cached", "live"] = setting("cached", "stored frames, or computed in every step (encoder)")
    stack_factor: int = setting(
        8, "frames of 20 ms concatenated to one token (encoder)", unit="frames", ge=1, le=50, formerly="stack"
    )
    width: int = setting(0, "inner width; 0 takes the language model's", unit="units", ge=0)
    soft_temperature: float = setting(1.0, "temperature of Whisper's token probabilities (soft)", gt=0)
    alignment_steps: int = setting(
        300,
        "steps of CTC alignment before the training, without the language model (encoder); 0 for none",
        unit="steps",
        ge=0,
        formerly="align_steps",
    )
    alignment_batch_size: int = setting(
        64, "recordings per step of the CTC alignment", unit="recordings", ge=1, formerly="align_batch_size"
    )
    alignment_learning_rate: float = setting(
        1e-3, "peak learning rate of the CTC alignment", gt=0, le=1, formerly="align_learning_rate"
    )
    temperature: float = setting(2.0, "distillation temperature of the compared predictions", gt=0)
    end_weight: float = setting(1.0, "additional weight of the token that ends an answer", ge=0)
    question: str = setting("Repeat after me: <audio>", "what the model is asked; the recording stands at <audio>")
    answers: Literal["repeat", "own"] = setting(
        "repeat", "training targets: the transcript (repeat), or the model's own answer to the transcript (own)"
    )
    answer_tokens: int = setting(32, "longest of the model's own answers", unit="tokens", ge=1)
    validation: int = setting(8, "recordings held out for validation", unit="recordings", ge=0)
    test: int = setting(16, "recordings held out for the test", unit="recordings", ge=0)
    split_column: str = setting("split", "column with train, validation or test; without it, splits are drawn")
    split_seed: int = setting(0, "seed of the split", ge=0)
    learning_rate: float = setting(1e-3, "peak learning rate of AdamW", gt=0, le=1)
    batch_size: int = setting(16, "conversations per optimiser step, over all processes", unit="sequences", ge=1)
