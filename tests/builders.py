"""Small models, examples and contexts for tests, built from configurations; nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from mlflow.utils.validation import _validate_metric_name
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

from mmphi.config import LanguageSettings
from mmphi.config.declared_view import SettingsView
from mmphi.data.content_hash import content_digest
from mmphi.data.schema import Example, ImageRef, Turn
from mmphi.data.tokenized_dataset import tokenize_example
from mmphi.models.language.language_model import LanguageModel
from mmphi.pipeline.stage import Context, Stage
from mmphi.stages import Settings
from mmphi.text.prompt import Prompt

FEATURE_TOKENS, FEATURE_WIDTH = 4, 12


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and an end of text."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end)


def tiny_language(seed: int = 0, **changes: Any) -> Any:
    """A frozen Phi of two layers with random weights."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": 256,
        "eos_token_id": 256,
    }
    model = PhiForCausalLM(PhiConfig(**{**shape, **changes})).requires_grad_(False).eval()
    model.name_or_path = "tiny"
    tokenizer = byte_tokenizer()
    settings = LanguageSettings(model="tiny", prompt="plain")
    return LanguageModel(model, tokenizer, Prompt(tokenizer, "plain"), 32, "tiny", "0", settings)


class RandomFeatures:
    """Features that depend on the image's content, or on its name where there is no such file."""

    tokens, width, digest = FEATURE_TOKENS, FEATURE_WIDTH, "random"

    def __contains__(self, image: object) -> bool:
        return True

    def prepare(self, images: object) -> None:
        pass

    def length(self, image: ImageRef) -> int:
        return self.tokens

    def rows(self, images: Sequence[ImageRef]) -> torch.Tensor:
        return self.get(images).flatten(0, 1)

    def get(self, images: Sequence[ImageRef]) -> torch.Tensor:
        rows = torch.zeros(len(images), self.tokens, self.width, dtype=torch.float16)
        for i, image in enumerate(images):
            there = image.content is not None or image.path.is_file()
            name = content_digest(image.source) if there else image.id
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            rows[i] = torch.randn(self.tokens, self.width, generator=generator).half()
        return rows


def example(number: int, answer: str, question: str = "", image: bool = True, split: Any = "train") -> Example:
    refs = (ImageRef(f"photos/{number}.jpg", Path(f"{number}.jpg")),) if image else ()
    return Example(str(number), refs, (Turn(question, answer),), "photos", split)


def of_length(tokens: int = FEATURE_TOKENS) -> Callable[[ImageRef], int]:
    """How many features an image has: always the same."""
    return lambda _: tokens


def encode(example: Example, prompt: Prompt, tokens: int, max_length: int) -> Any:
    """An example as a sequence."""
    return tokenize_example(example, prompt, of_length(tokens), max_length)


def context(stage: Stage, folder: Path, settings: Settings, **given: Any) -> Context:
    """What a stage's function is given, with a tracker that keeps what it is told."""
    folder.mkdir(exist_ok=True, parents=True)
    given = {"upstream": {}, "tracker": Recorder(), **given}
    return Context(SettingsView(settings, stage.declared), folder, **given)


@dataclass
class Recorder:
    """A tracker that keeps what it is told."""

    run_id: str = "run"
    metric_rows: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    tables: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    tagged: dict[str, str] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        for name in values:
            _validate_metric_name(name)  # As MLflow itself does, which some tests leave out.
        self.metric_rows.append((step, dict(values)))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], image: str = "") -> None:
        self.tables.setdefault(name, []).extend(rows)

    def figure(self, name: str, figure: Any) -> None:
        self.figures[name] = figure

    def text(self, name: str, content: str) -> None:
        self.texts[name] = content

    def checkpoint(self, folder: Path) -> None:
        assert (folder / "complete").exists()
        self.checkpoints.append(folder.name)

    def tags(self, values: Mapping[str, str]) -> None:
        self.tagged.update(values)

    def say(self, line: str) -> None:
        self.said.append(line)

    def series(self, name: str) -> dict[int, float]:
        return {step: values[name] for step, values in self.metric_rows if name in values}


TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


def unavailable(reason: str) -> NoReturn:
    """Skip a test, or fail it where MMPHI_REQUIRE_SERVICES says that everything it needs is installed."""
    if os.environ.get("MMPHI_REQUIRE_SERVICES"):
        pytest.fail(f"{reason}, and MMPHI_REQUIRE_SERVICES is set")
    pytest.skip(reason)
