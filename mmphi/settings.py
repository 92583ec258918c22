"""Every setting of every stage, with its type, bounds, default, unit and meaning.

Settings that change a stage's result are part of its key; the few that do not (``matters=False``: how many workers,
how often to log) are left out of it, so that changing them reuses finished work.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

Precision = Literal["fp32", "bf16", "8bit", "4bit"]
File = Literal["", "path", "name"]


def setting(default: Any, help: str, *, unit: str = "", matters: bool = True, file: File = "", **bounds: Any) -> Any:
    """A field with its meaning and unit.

    Args:
        default: Value where no preset says otherwise.
        help: One line for ``--help``.
        unit: Unit of the value, empty for plain numbers and names.
        matters: Whether the value can change a result, and so belongs in the stage's key.
        file: ``path`` where the value is a file or folder, ``name`` where it may be one or else a name. A path counts
            from the file it is written in, must be there, and stands in the key by its content.
        **bounds: pydantic's ``ge``, ``gt``, ``le``, ``lt``.
    """
    extra: JsonDict = {"unit": unit, "matters": matters, "file": file}
    if isinstance(default, list | dict):
        return Field(default_factory=lambda: default.copy(), description=help, json_schema_extra=extra, **bounds)
    return Field(default=default, description=help, json_schema_extra=extra, **bounds)


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values keep their type."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


class ScenesSettings(Section):
    """Scenes drawn by the program: two coloured shapes in a relation, with captions and questions."""

    train_images: int = setting(3000, "images to train on", unit="images", ge=8)
    validation_images: int = setting(100, "images of seen combinations kept apart", unit="images", ge=1)
    test_images: int = setting(200, "images of combinations training never saw", unit="images", ge=1)
    held_out: float = setting(0.15, "share of colour-shape-relation combinations kept for the test", gt=0, lt=0.9)
    image_size: int = setting(96, "side of the drawn images", unit="px", ge=32, le=1024)
    questions: int = setting(2, "question-answer turns beside each caption", unit="turns", ge=0, le=8)
    texts: int = setting(20000, "scenes written as words for the language model to read", unit="texts", ge=0)


class SourceSettings(Section):
    """One dataset of a mixture."""

    kind: Literal["scenes", "llava", "captions", "karpathy", "datasets"] = setting("scenes", "file format")
    name: str = setting("", "name in reports; empty takes the kind")
    path: str = setting("", "the JSON or CSV file, or a `datasets` name (owner/name:config) or folder", file="name")
    images: str = setting("", "folder that the image paths are relative to", file="path")
    split: str = setting("train", "split of a `datasets` dataset")
    image_column: str = setting("image", "column of the image (captions, datasets)")
    text_column: str = setting("caption", "column of the text (captions, datasets)")
    question: str = setting("", "question put before every caption; empty asks nothing")
    weight: float = setting(1.0, "share of this source in the mixture, relative to the others", gt=0)


class DataSettings(Section):
    """What to train and evaluate on."""

    sources: list[SourceSettings] = setting([], "datasets of the mixture; none means scenes")
    validation_images: int = setting(
        100, "images kept apart for validation (scenes bring their own)", unit="images", ge=0
    )
    test_images: int = setting(100, "images kept apart for the test (scenes bring their own)", unit="images", ge=0)
    max_images: int = setting(0, "take at most this many images of each source; 0 takes all", unit="images", ge=0)
    max_bad_share: float = setting(0.05, "stop where more rows than this share are unusable", ge=0, le=1)
    max_answer_words: int = setting(2000, "drop answers longer than this", unit="words", ge=1)
    split_seed: int = setting(0, "seed of the split by image and of the mixture", ge=0)

    @model_validator(mode="after")
    def _names_differ(self) -> DataSettings:
        names = [source.name or source.kind for source in self.sources]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:  # Their images would share ids, and so features.
            raise ValueError(f"two sources are called {twice!r}; give each a name of its own")
        return self


class VisionSettings(Section):
    """The image tower and which of its tokens the language model sees."""

    model: str = setting(
        "light_clip", "open_clip model name, its JSON config, or light_clip (the one trained here)", file="name"
    )
    pretrained: str = setting(
        "", "open_clip pretrained tag or a local weights file; empty with light_clip", file="name"
    )
    layer: int = setting(-2, "which transformer block's tokens: -1 is the last, -2 the one before", ge=-64, le=-1)
    cls: Literal["drop", "keep"] = setting("drop", "whether the CLS token stands before the patches")
    pool: int = setting(1, "side of the square of patches averaged into one token", unit="patches", ge=1, le=16)
    precision: Literal["fp32", "bf16"] = setting("fp32", "arithmetic of the tower")


class LanguageSettings(Section):
    """The causal language model that answers."""

    model: str = setting(
        "pretrain", "hub name, folder, config.json (random weights), or pretrain (the one trained here)", file="name"
    )
    tokenizer: str = setting("", "hub name, folder or phi-2 (built offline); empty takes the model's own", file="name")
    precision: Precision = setting("fp32", "weights of the frozen model")
    prompt: Literal["auto", "plain", "phi", "chat"] = setting("auto", "how question and answer are written")


class TrainingSettings(Section):
    """What every trained stage shares."""

    steps: int = setting(1000, "optimiser steps", unit="steps", ge=1)
    batch_size: int = setting(32, "sequences per optimiser step, over all processes", unit="sequences", ge=1)
    accumulation: int = setting(1, "forward passes per step and process", unit="passes", ge=1)
    learning_rate: float = setting(1e-3, "peak learning rate of AdamW", gt=0, le=1)
    warmup: float = setting(0.03, "share of the steps that warm up", ge=0, lt=1)
    schedule: Literal["cosine", "linear", "constant"] = setting("cosine", "learning rate after the warm-up")
    weight_decay: float = setting(0.0, "AdamW's weight decay, on matrices only", ge=0, le=1)
    beta2: float = setting(0.999, "AdamW's second decay rate", gt=0, lt=1)
    max_grad_norm: float = setting(1.0, "gradient norm is clipped to this", gt=0)
    max_length: int = setting(512, "longest sequence, image tokens included", unit="tokens", ge=8)
    precision: Literal["auto", "fp32", "bf16"] = setting("auto", "autocast; auto is bf16 on a GPU that has it")
    gradient_checkpointing: bool = setting(False, "recompute activations to save memory", matters=False)
    eval_every: int = setting(200, "steps between validations", unit="steps", matters=False, ge=1)
    save_every: int = setting(200, "steps between checkpoints", unit="steps", matters=False, ge=1)
    log_every: int = setting(10, "steps between logged training losses", unit="steps", matters=False, ge=1)
    keep_checkpoints: int = setting(1, "finished checkpoints kept", unit="checkpoints", matters=False, ge=1)


class PretrainSettings(TrainingSettings):
    """A Phi-shaped language model trained from scratch."""

    corpus: list[str] = setting([], "text files; none means scenes written as words", file="path")
    learn: Literal["everything", "answers"] = setting("answers", "which tokens of scenes' texts are learned")
    layers: int = setting(4, "transformer layers", unit="layers", ge=1, le=128)
    width: int = setting(128, "hidden width", unit="units", ge=16)
    heads: int = setting(4, "attention heads", unit="heads", ge=1)
    context: int = setting(512, "longest context", unit="tokens", ge=16)
    vocabulary: int = setting(512, "size of an own byte-level BPE; 0 takes Phi-2's", unit="tokens", ge=0, le=200000)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> PretrainSettings:
        if self.width % self.heads:
            near = min((h for h in range(1, self.width + 1) if self.width % h == 0), key=lambda h: abs(h - self.heads))
            raise ValueError(
                f"heads = {self.heads} does not divide width = {self.width}; the nearest that does is {near}"
            )
        return self


class LightClipSettings(Section):
    """A small CLIP trained here with open_clip's own loss."""

    image_tower: str = setting("", "timm model name; empty trains one from nothing")
    from_nothing: Literal["resnet", "vit"] = setting("resnet", "kind of the tower trained from nothing")
    image_weights: str = setting("", "safetensors file of the image tower's weights", file="path")
    text_tower: str = setting(
        "", "Hugging Face folder of the text tower; empty trains a small transformer from nothing", file="path"
    )
    lock_image: bool = setting(False, "keep the image tower's weights as they are")
    lock_text: bool = setting(False, "keep the text tower's weights as they are")
    image_size: int = setting(64, "side of the input image", unit="px", ge=16, le=1024)
    patch_size: int = setting(8, "side of a patch (ViT)", unit="px", ge=2)
    width: int = setting(128, "width of the towers trained from nothing", unit="units", ge=16)
    layers: int = setting(4, "layers of the towers trained from nothing", unit="layers", ge=1, le=64)
    embed_dim: int = setting(128, "width of the shared space", unit="units", ge=8)
    steps: int = setting(600, "optimiser steps", unit="steps", ge=1)
    batch_size: int = setting(128, "images per step", unit="images", ge=2)
    captions: int = setting(1, "captions of each image per step", unit="captions", ge=1, le=16)
    learning_rate: float = setting(1e-3, "peak learning rate of AdamW", gt=0, le=1)
    weight_decay: float = setting(0.1, "AdamW's weight decay", ge=0, le=1)
    warmup: float = setting(0.05, "share of the steps that warm up", ge=0, lt=1)
    dropout: float = setting(0.0, "share of a locked tower's outputs dropped in training", ge=0, lt=1)
    save_every: int = setting(200, "steps between checkpoints", unit="steps", matters=False, ge=1)
    log_every: int = setting(10, "steps between logged losses", unit="steps", matters=False, ge=1)
    workers: int = setting(2, "processes that decode images", unit="processes", matters=False, ge=0)


class EmbedSettings(Section):
    """Image features computed once and stored."""

    batch_size: int = setting(64, "images per forward pass", unit="images", matters=False, ge=1)
    workers: int = setting(2, "processes that decode images", unit="processes", matters=False, ge=0)
    shard_images: int = setting(4096, "images per file", unit="images", matters=False, ge=1)


class ProjectorSettings(TrainingSettings):
    """The layers between image features and language model, trained with both frozen."""

    features: Literal["cached", "live"] = setting("cached", "stored features, or computed anew every step")
    layers: int = setting(2, "linear layers: 1 is linear, 2 is LLaVA-1.5's", unit="layers", ge=1, le=8)
    width: int = setting(0, "hidden width; 0 takes the language model's", unit="units", ge=0)
    activation: Literal["gelu", "relu", "silu"] = setting("gelu", "between the layers")
    norm: bool = setting(False, "normalise every feature vector before the first layer")
    dropout: float = setting(0.0, "share of each layer's inputs dropped in training", ge=0, lt=1)
    sample_images: int = setting(
        8, "validation images captioned at each evaluation", unit="images", matters=False, ge=0
    )


class EvaluateSettings(Section):
    """How answers are measured."""

    split: Literal["train", "validation", "test"] = setting("test", "which images")
    max_images: int = setting(200, "at most this many images; 0 takes all", unit="images", ge=0)
    max_new_tokens: int = setting(48, "longest answer", unit="tokens", ge=1)
    batch_size: int = setting(32, "answers generated at once", unit="answers", matters=False, ge=1)
    checkpoint: str = setting("final", "final, or the step of a kept checkpoint")
    yes_no: int = setting(200, "POPE-style yes/no questions; 0 asks none", unit="questions", ge=0)
    candidates: int = setting(1, "captions sampled, of which the most agreed on is taken; 1 is greedy", ge=1)
    temperature: float = setting(0.5, "of sampled candidates", gt=0)


class Settings(Section):
    """All sections of one experiment."""

    name: str = setting("tiny", "name of the preset or experiment", matters=False)
    seed: int = setting(0, "seed of weights and data order", ge=0)
    scenes: ScenesSettings = ScenesSettings()
    data: DataSettings = DataSettings()
    vision: VisionSettings = VisionSettings()
    language: LanguageSettings = LanguageSettings()
    pretrain: PretrainSettings = PretrainSettings()
    light_clip: LightClipSettings = LightClipSettings()
    embed: EmbedSettings = EmbedSettings()
    projector: ProjectorSettings = ProjectorSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    def uses_scenes(self) -> bool:
        """Whether any source of the mixture is the drawn scenes."""
        return not self.data.sources or any(source.kind == "scenes" for source in self.data.sources)
