"""Whatever a language model's layers see, its answers in a conversation are those of transformers' generate."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers
from builders import byte_tokenizer

from mmphi.config import LanguageSettings
from mmphi.generation.engine import Engine
from mmphi.generation.prefill import Prefill, Way, attention_masks
from mmphi.generation.sampling import SamplingParams
from mmphi.models.language.language_model import LanguageModel
from mmphi.models.multimodal import Multimodal
from mmphi.text.prompt import Prompt

COMMON: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON |= {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
KINDS: dict[str, tuple[str, dict[str, Any], Way]] = {
    "everything": ("Llama", COMMON, "together"),
    "a window": ("Mistral", COMMON | {"sliding_window": 24}, "together"),
    "a window in every second layer": (
        "Gemma3",
        COMMON | {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
        "together",
    ),
    "chunks": (
        "Llama4",
        COMMON
        | {"attention_chunk_size": 24, "layer_types": ["chunked_attention", "full_attention"], "num_local_experts": 2}
        | {"intermediate_size_mlp": 64, "num_experts_per_tok": 1, "no_rope_layers": [1, 0]},
        "together",
    ),
    "a window built in": (
        "GPTNeo",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 24, "max_position_embeddings": 512}
        | {"attention_types": [[["global", "local"], 1]]},
        "one by one",
    ),
    "a state": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "anew"),
}


def language_of(kind: str) -> LanguageModel:
    name, shape, _ = KINDS[kind]
    configuration: Any = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = configuration(**shape, vocab_size=260, initializer_range=0.2)
    model = getattr(transformers, f"{name}ForCausalLM")(config).requires_grad_(False).eval()
    return LanguageModel(model, tokenizer, Prompt(tokenizer, "plain"), 32, name, "0", LanguageSettings(model=name))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_generate(kind: str) -> None:
    language = language_of(kind)
    model = Multimodal(language, None, None, max_length=512)
    questions = ["hi", "what is the colour of the third of them?", "a question that is longer than any window " * 3]
    engine = Engine(model, slots=2)
    assert engine.reader.way == KINDS[kind][2]
    answers = [engine.submit(model.open_prompt(None, q), SamplingParams(max_tokens=30)) for q in questions]
    while engine.busy:
        engine.step()
    for question, answer in zip(questions, answers, strict=True):
        assert answer.error is None
        assert answer.text == model.generate([(None, question)], 30)[0].text


def test_a_conversation_may_be_longer_than_a_window() -> None:
    for kind in ("a window", "a window in every second layer", "chunks", "a window built in"):
        assert Engine(Multimodal(language_of(kind), None, None)).length == 512


@pytest.mark.parametrize("kind", ["a window built in", "chunks", "a window"])
def test_sequences_longer_than_a_window_are_trained_on_alone(kind: str) -> None:
    language = language_of(kind)
    assert not language.packs(25)
    assert language.layout(25).kind == "alone"


def longrope(length: int) -> Any:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 64, **factors}
    shape = COMMON | {"original_max_position_embeddings": 64, "rope_parameters": rope, "pad_token_id": 0}
    torch.manual_seed(0)
    config = transformers.Phi3Config(**shape, vocab_size=260, initializer_range=0.2)
    return Prefill(transformers.Phi3ForCausalLM(config).eval(), 2, length, 1e-3)


def test_where_angles_depend_on_the_longest_of_a_batch_each_is_read_alone() -> None:
    assert longrope(64).way == "together"
    long = longrope(128)
    assert long.way == "anew"
    ids = torch.arange(100)[None] % 250
    embed, model = long.model.get_input_embeddings(), long.model
    with torch.inference_mode():
        for start in range(0, 100, 20):
            logits = long.read([1], [start], embed(ids[:, start : start + 20]))
        torch.testing.assert_close(logits, model(input_ids=ids).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_another_engine_of_the_model_changes_nothing_while_it_is_made() -> None:
    """Its windows are narrowed while it is probed."""
    language = language_of("a window")
    model = Multimodal(language, None, None, max_length=512)
    question = "a question that is longer than any window " * 2
    expected = model.generate([(None, question)], 20)[0].text
    done = threading.Event()

    def make() -> None:
        while not done.is_set():
            Prefill(language.model, 1, 512, 1e-3)

    making = threading.Thread(target=make)
    making.start()
    try:
        for _ in range(5):
            assert (
                "".join(Engine(model).stream(model.open_prompt(None, question), SamplingParams(max_tokens=20)))
                == expected
            )
    finally:
        done.set()
        making.join()


def test_masks_are_those_of_each_kind_of_layer() -> None:
    seen = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    config = transformers.Gemma3TextConfig(
        num_hidden_layers=2, sliding_window=2, layer_types=["sliding_attention", "full_attention"]
    )
    masks = attention_masks(config, seen)
    assert torch.equal(masks["full_attention"], seen)
    assert masks["sliding_attention"][0, 0].sum(dim=-1).tolist() == [1, 2, 2, 2, 2, 2]
    chunked = transformers.Llama4TextConfig(
        num_hidden_layers=1, attention_chunk_size=3, layer_types=["chunked_attention"]
    )
    assert attention_masks(chunked, seen)["chunked_attention"][0, 0].sum(dim=-1).tolist() == [1, 2, 3, 1, 2, 3]
