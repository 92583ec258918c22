"""Which models keep packed sequences apart, and what is done with those that do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import RandomFeatures, encode, example, tiny_language
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    Phi3Config,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
)

from mmphi.models.language.packing_check import packing_error, shortest_window
from mmphi.models.multimodal import Multimodal
from mmphi.models.packed_vlm import PackedVLM
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.text.packing import Layout, pack

COMMON = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "pad_token_id": 0}
MAMBA = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8, "pad_token_id": 0}
NEXT = {
    "head_dim": 8,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
GEMMA = {"lru_width": 32, "attention_window_size": 16, "num_attention_heads": 4, "intermediate_size": 64}
ISOLATE = [
    LlamaConfig(**COMMON, **HEADS),
    GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2),
    MistralConfig(**COMMON, **HEADS, sliding_window=8),
    Phi3Config(**COMMON, **HEADS, sliding_window=8),
]
LEAK = [
    Mamba2Config(**COMMON, **MAMBA),
    BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2),
    Qwen3NextConfig(**COMMON, **HEADS, **NEXT),
    RecurrentGemmaConfig(**COMMON, **GEMMA, block_types=["recurrent", "attention"], pad_token_id=0),
]


def build(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("config", ISOLATE, ids=lambda c: c.model_type)
def test_plain_attention_keeps_sequences_apart(config):
    if getattr(config, "sliding_window", None):
        config = type(config)(**{**config.to_dict(), "sliding_window": 64})
    assert packing_error(build(config)) < 1e-4


@pytest.mark.parametrize("config", LEAK, ids=lambda c: c.model_type)
def test_recurrent_and_hybrid_models_do_not(config):
    assert packing_error(build(config)) > 1e-2


def test_windows_are_known():
    windows = [shortest_window(config) for config in ISOLATE]
    assert windows == [0, 0, 8, 8]


@pytest.mark.parametrize("config", [*LEAK, ISOLATE[2]], ids=lambda c: c.model_type)
def test_one_sequence_a_row_equals_the_model_itself(config):
    """Losses of sequences that are read together equal those of the model's own forward pass, one by one."""
    language = replace(tiny_language(), model=build(config))
    projector = Projector(ProjectorConfig(RandomFeatures.width, 32))
    model = Multimodal(language, projector, RandomFeatures(), 200)
    assert model.packed.layout.kind == "alone"
    examples = [example(i, "a dog runs in the snow" * (1 + i % 2), image=i % 2 == 0) for i in range(4)]
    samples = [encode(e, language.prompt, 4, 200) for e in examples]
    expected = 0.0
    for sample in samples:
        rows = pack([sample], model.sources)
        embeddings = model.packed.embed(rows["input_ids"], rows["features"], rows["places"])
        labels = torch.where(torch.from_numpy(sample.supervised), rows["input_ids"][0], -100)[None]
        logits = language.model(inputs_embeds=embeddings, use_cache=False).logits[0, :-1].float()
        expected += torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
    nats, tokens = model.losses(examples)
    assert tokens == sum(int(s.supervised.sum()) for s in samples)
    assert nats == pytest.approx(expected, rel=1e-4)


def test_a_window_that_no_sequence_reaches_does_not_matter():
    config = MistralConfig(**COMMON, **HEADS, sliding_window=64)
    language = replace(tiny_language(), model=build(config))
    assert language.packs(64)
    assert not language.packs(65)


def test_rows_of_one_sequence(tmp_path):
    samples = [encode(example(i, "a" * (3 + i)), tiny_language().prompt, 4, 100) for i in range(3)]
    rows = pack(samples, {"image": RandomFeatures()}, layout=Layout("alone"))
    assert rows["input_ids"].shape[0] == 3
    assert (rows["segments"].max(dim=1).values == 0).all()
    model = PackedVLM(tiny_language().model, layout=Layout("alone"))
    assert isinstance(model._walls(rows)["attention_mask"], torch.Tensor)
