"""The sections that several stages read: data, vision encoder, language model, and common training settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

from pydantic import ValidatorFunctionWrapHandler, field_validator, model_validator

from mmphi.config.section import Section, setting

Precision = Literal["fp32", "bf16", "8bit", "4bit"]
SourceKind = Literal["scenes", "llava", "captions", "karpathy", "datasets"]  # See mmphi/data/readers.py.
REGISTERED_KINDS: set[str] = set()  # Further kinds of this process, from mmphi.data.readers.register.


class SourceSettings(Section):
    """One dataset of a mixture."""

    kind: SourceKind = setting("scenes", "reader of the rows")
    name: str = setting("", "name in reports; empty takes the kind")
    path: str = setting("", "the JSON or CSV file, or a `datasets` name (owner/name:config) or folder", file="name")
    images: str = setting("", "folder that the image paths are relative to", file="path")
    split: str = setting("train", "split of a `datasets` dataset")
    image_column: str = setting("image", "column of the image (captions, datasets)")
    text_column: str = setting("caption", "column of the text (captions, datasets)")
    question: str = setting("", "question put before every caption; empty asks nothing")
    revision: str = setting("", "revision of a `datasets` name; empty takes the newest, and notes which that was")
    weight: float = setting(1.0, "share of this source in the mixture, relative to the others", gt=0)

    @field_validator("kind", mode="wrap")
    @classmethod
    def _may_be_registered(cls, value: Any, standard: ValidatorFunctionWrapHandler) -> SourceKind:
        return cast(SourceKind, value if isinstance(value, str) and value in REGISTERED_KINDS else standard(value))

    @model_validator(mode="after")
    def _scenes_have_no_files(self) -> SourceSettings:
        """Refuse files without a kind, which would silently train on drawn scenes."""
        if self.kind == "scenes" and (self.path or self.images):
            given = "path" if self.path else "images"
            raise ValueError(f"a source with {given} needs a kind: {', '.join(source_kinds()[1:])}")
        return self


def source_kinds() -> tuple[str, ...]:
    """Return all kinds of sources, those registered in this process last; the first is ``scenes``."""
    return (*get_args(SourceKind), *sorted(REGISTERED_KINDS))


READING = 2  # Version 2: each picture in one split only, more conversation formats, and counted turns.


class DataSettings(Section):
    """Data for training and evaluation."""

    sources: list[SourceSettings] = setting([], "datasets of the mixture; none means scenes")
    validation_images: int = setting(
        100, "images held out for validation (scenes bring their own)", unit="images", ge=0
    )
    test_images: int = setting(100, "images held out for the test (scenes bring their own)", unit="images", ge=0)
    max_images: int = setting(0, "take at most this many images of each source; 0 takes all", unit="images", ge=0)
    max_bad_share: float = setting(
        0.05, "stop where more rows than this share are unusable", affects_key=False, ge=0, le=1
    )
    max_answer_words: int = setting(2000, "drop answers longer than this", unit="words", ge=1)
    split_seed: int = setting(0, "seed of the split by image and of the mixture", ge=0)
    near_duplicates: Literal["keep", "group"] = setting(
        "keep", "group: files that nearly show the same picture (another size or compression) share a split, too"
    )

    reading: int = setting(
        1,
        "version of the rules for reading external data files; mmphi sets it",
        legacy_default=1,
        ge=1,
        le=READING,
    )

    @model_validator(mode="after")
    def _read_anew(self) -> DataSettings:
        """Set the version of the reading rules (1 for drawn scenes), so that results of older rules are not reused."""
        own = any(source.kind != "scenes" for source in self.sources)
        self.__dict__["reading"] = READING if own else 1
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> DataSettings:
        names = [source.name or source.kind for source in self.sources]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:  # Their images would share IDs, and therefore features.
            raise ValueError(f"two sources are called {twice!r}; give each a name of its own")
        return self


def sources_of(data: DataSettings) -> Sequence[SourceSettings]:
    """Return the sources of a mixture; drawn scenes by default."""
    return data.sources or [SourceSettings()]


def uses_scenes(data: DataSettings) -> bool:
    """Return whether the mixture contains drawn scenes."""
    return any(source.kind == "scenes" for source in sources_of(data))


class VisionSettings(Section):
    """The vision encoder and its output tokens."""

    model: str = setting(
        "light_clip",
        "open_clip model name, its JSON config, a folder with open_clip_config.json and weights, or light_clip (the one"
        " trained here)",
        file="name",
        names=("light_clip",),
    )
    pretrained: str = setting(
        "",
        "open_clip pretrained tag, a local weights file, or random; empty with light_clip and a folder",
        file="weights",
        names=("random",),
    )
    mean: list[float] = setting([], "mean of each colour channel, to override that of the encoder's config")
    std: list[float] = setting(
        [], "standard deviation of each colour channel, to override that of the encoder's config"
    )
    interpolation: Literal["auto", "bicubic", "bilinear"] = setting(
        "auto", "interpolation of image resizing; auto takes that of the encoder's config"
    )
    resize: Literal["auto", "shortest", "longest", "squash"] = setting(
        "auto", "side that is resized to the input size; squash fits both, auto takes the encoder's config"
    )
    quick_gelu: Literal["auto", "yes", "no"] = setting(
        "auto", "whether the encoder uses OpenAI's QuickGELU; auto follows its config"
    )
    revision: str = setting("", "revision of the tag's hub repository; empty takes the newest, and notes which")
    layer: int = setting(-2, "which transformer block's tokens: -1 is the last, -2 the one before", ge=-64, le=-1)
    cls: Literal["drop", "keep"] = setting("drop", "whether the CLS token is kept before the patch tokens")
    pool: int = setting(1, "side of the square of patches averaged into one token", unit="patches", ge=1, le=16)
    precision: Literal["fp32", "bf16"] = setting("fp32", "arithmetic of the encoder")


class LanguageSettings(Section):
    """The causal language model."""

    model: str = setting(
        "pretrain",
        "hub name, folder, config.json (random weights), or pretrain (the one trained here)",
        file="name",
        names=("pretrain",),
    )
    revision: str = setting("", "revision of a hub model; empty takes the newest, and notes which that was")
    tokenizer: str = setting(
        "", "hub name, folder or phi-2 (built offline); empty takes the model's own", file="name", names=("phi-2",)
    )
    precision: Precision = setting("fp32", "weights of the frozen model")
    prompt: Literal["auto", "plain", "phi", "chat"] = setting("auto", "how question and answer are written")


class TrainingSettings(Section):
    """Common settings of all training stages."""

    seed: int = setting(0, "seed of weights, data order and dropout", ge=0)
    steps: int = setting(1000, "optimiser steps", unit="steps", ge=1)
    batch_size: int = setting(32, "sequences per optimiser step, over all processes", unit="sequences", ge=1)
    gradient_accumulation_steps: int = setting(
        1, "forward passes per step and process", unit="passes", ge=1, formerly="accumulation"
    )
    optimizer: Literal["adamw", "muon"] = setting("adamw", "muon: Muon for inner matrices, AdamW for the rest")
    learning_rate: float = setting(1e-3, "peak learning rate of AdamW", gt=0, le=1)
    muon_learning_rate: float = setting(0.02, "peak learning rate of Muon", gt=0, le=1)
    warmup_ratio: float = setting(0.03, "share of the steps that warm up", ge=0, lt=1, formerly="warmup")
    lr_scheduler: Literal["cosine", "linear", "constant", "wsd"] = setting(
        "cosine", "learning rate after the warm-up; wsd stays at the peak, then cools down", formerly="schedule"
    )
    decay: float = setting(0.2, "share of the steps that cool down at the end (wsd)", ge=0, le=1)
    weight_decay: float = setting(0.0, "AdamW's weight decay, on matrices only", ge=0, le=1)
    beta2: float = setting(0.999, "AdamW's second decay rate", gt=0, lt=1)
    max_grad_norm: float = setting(1.0, "gradient norm is clipped to this", gt=0)
    max_length: int = setting(512, "longest sequence, image tokens included", unit="tokens", ge=8)
    precision: Literal["auto", "fp32", "bf16"] = setting("auto", "autocast; auto is bf16 on a GPU that has it")
    gradient_checkpointing: bool = setting(False, "recompute activations to save memory", affects_key=False)
    eval_every: int = setting(200, "steps between validations", unit="steps", affects_key=False, ge=1)
    save_every: int = setting(200, "steps between checkpoints", unit="steps", affects_key=False, ge=1)
    log_every: int = setting(10, "steps between logged training losses", unit="steps", affects_key=False, ge=1)
    share_checkpoints: bool = setting(
        False, "send checkpoints to a remote store, so that another host can go on from them", affects_key=False
    )
    workers: int = setting(0, "processes that prepare batches", unit="processes", affects_key=False, ge=0)
    keep_checkpoints: int = setting(1, "finished checkpoints kept", unit="checkpoints", affects_key=False, ge=1)


class ConversationSettings(TrainingSettings):
    """Common settings of trainings on conversations."""

    checkpoint_selection: Literal["last", "best"] = setting(
        "last",
        "weights that are the result: of the last step, or of the lowest validation loss",
        legacy_default="last",
        formerly="result",
    )
    supervised_tokens: int = setting(
        0, "train on this many supervised tokens, in place of `steps`; 0 uses `steps`", unit="tokens", ge=0
    )
    max_examples_per_image: int = setting(
        1,
        "conversations about an image that follow one another, at most; they share its tokens where rows are packed",
        unit="conversations",
        ge=1,
        legacy_default=1,
        formerly="together",
    )
    contrastive_weight: float = setting(
        0.0,
        "weight of the hard-negative loss: the right image should reduce the loss by 1.5 nats a token",
        ge=0,
        le=10,
        legacy_default=0.0,
        formerly="contrast",
    )
    contrastive_start: float = setting(
        0.85,
        "share of the steps after which the contrastive loss is used",
        ge=0,
        lt=1,
        legacy_default=0.85,
        formerly="contrast_from",
    )
    sample_images: int = setting(
        8, "validation images captioned at each evaluation", unit="images", affects_key=False, ge=0
    )
    sample_tokens: int = setting(
        32, "longest caption at an evaluation during training", unit="tokens", affects_key=False, ge=1
    )
