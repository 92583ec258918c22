"""The section of a language model trained from scratch."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from mmphi.config.section import setting
from mmphi.config.shared import TrainingSettings

Size = Literal["custom", "1M", "10M", "30M", "124M", "350M", "1.3B", "phi-2"]


class PretrainSettings(TrainingSettings):
    """A Phi-shaped language model trained from scratch, on a corpus or on scenes written as words."""

    source: Literal["files", "store", "stream"] = setting(
        "files",
        "source of the texts: corpus.sources (files), the store of textgen, or running generators (stream)",
        legacy_default="files",
    )
    window_tokens: int = setting(
        2_000_000, "size of the replay buffer of recent text (stream)", legacy_default=2_000_000, unit="tokens", ge=1024
    )
    max_epochs: int = setting(
        4,
        "largest number of times a document is trained on (stream)",
        legacy_default=4,
        unit="times",
        ge=1,
        formerly="passes",
    )
    keep: bool = setting(
        True, "keep the clean part of the text in a store, as textgen does (stream)", affects_key=False
    )
    size: Size = setting("custom", "shape of the model by name; custom takes layers, width and heads")
    layers: int = setting(4, "transformer layers (custom)", unit="layers", ge=1, le=128)
    width: int = setting(128, "hidden width (custom)", unit="units", ge=16)
    heads: int = setting(4, "attention heads (custom)", unit="heads", ge=1)
    tied: bool = setting(False, "whether the output head shares the embedding's weights (custom)")
    partial_rotary_factor: float = setting(
        0.0, "share of a head's channels with rotary embeddings (custom); 0 takes Phi's", legacy_default=0.0, ge=0, le=1
    )
    initializer_range: float = setting(
        0.02,
        "standard deviation of the initial weights; narrow models need a larger one",
        legacy_default=0.02,
        gt=0,
        le=1,
    )
    context: int = setting(512, "longest context; of a corpus, the tokens of a row", unit="tokens", ge=16)
    learning_rate: float = setting(
        0.0, "peak learning rate of AdamW; 0 follows size, batch and length", legacy_default=1e-3, ge=0, le=1
    )
    muon_learning_rate: float = setting(
        0.0, "peak learning rate of Muon; 0 follows the batch", legacy_default=0.02, ge=0, le=1
    )
    batch_tokens: int = setting(8192, "tokens per optimiser step, over all processes (corpus)", unit="tokens", ge=16)
    stop: str = setting(
        "initial-1", "when to end (corpus): initial-1, loss 5, tokens 2M, steps 100, time 20m; the first of several"
    )
    supervised_tokens: int = setting(
        0,
        "number of supervised tokens after which training ends, in place of `stop` (corpus); 0 uses `stop`",
        unit="tokens",
        ge=0,
    )
    eval_text: str = setting(
        "",
        "text of a public benchmark to measure the loss on, such as WikiText-2's test split",
        file="path",
        formerly="public_text",
    )
    eval_windows: int = setting(
        0,
        "largest number of windows of eval_text scored at each validation; 0 scores all",
        ge=0,
        formerly="public_windows",
    )
    reference: float = setting(
        2.273,
        "reference loss (Phi-2 on WikiText-2); the time until the loss is within 1 nat of it is reported",
        unit="nats",
        affects_key=False,
        gt=0,
    )
    validation_tokens: int = setting(
        65536, "largest number of held-out tokens scored at each validation", unit="tokens", ge=512
    )
    prompts: list[str] = setting(
        ["The", "In the year", "She looked at him and"],
        "prompts of the text samples at each validation",
        affects_key=False,
    )
    compile: bool = setting(
        False, "compile the layers with torch.compile; a message reports where it is not possible", affects_key=False
    )
    shard: bool = setting(
        False, "shard parameters over the processes (FSDP2) instead of replicating them", affects_key=False
    )
    peak_tflops: float = setting(
        0.0,
        "peak throughput of the device for MFU; 0 takes its data sheet, or measures",
        unit="TFLOP/s",
        affects_key=False,
        ge=0,
    )
    loss_on: Literal["everything", "answers"] = setting("answers", "supervised tokens of scene texts", formerly="learn")
    vocabulary: int = setting(
        512, "size of an own byte-level BPE for scenes; 0 takes Phi-2's", unit="tokens", ge=0, le=200000
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> PretrainSettings:
        if self.width % self.heads:
            near = min((h for h in range(1, self.width + 1) if self.width % h == 0), key=lambda h: abs(h - self.heads))
            raise ValueError(
                f"heads = {self.heads} does not divide width = {self.width}; the nearest that does is {near}"
            )
        return self

    @model_validator(mode="after")
    def _rows_make_a_batch(self) -> PretrainSettings:
        rows = self.batch_tokens // self.context
        if rows * self.context != self.batch_tokens:
            near = max(1, round(self.batch_tokens / self.context)) * self.context
            raise ValueError(
                f"batch_tokens = {self.batch_tokens} is no multiple of context = {self.context}; the nearest is {near}"
            )
        return self
