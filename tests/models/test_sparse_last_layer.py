"""The last layer computes only what is predicted from, and nobody can tell by losses and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import RandomFeatures, encode, example, tiny_language
from peft import LoraConfig, inject_adapter_in_model
from test_packing_check import COMMON, HEADS, ISOLATE, LEAK, build
from transformers import BloomConfig, Gemma2Config, GPTNeoXConfig, OPTConfig, Qwen3Config

from mmphi.models import packed_vlm
from mmphi.models.packed_vlm import PackedVLM
from mmphi.models.patches.sparse_last_layer import compute_at_positions, find_positionwise_modules
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.text.packing import Layout, pack

ANSWERS = ["a dog", "two men on a bench", "snow", "b" * 60, "it rains", "ok"]
SMALL = {"num_attention_heads": 4, "pad_token_id": 0}
MORE = [
    OPTConfig(**COMMON, **SMALL, ffn_dim=64, word_embed_proj_dim=32, dropout=0.1),
    GPTNeoXConfig(**COMMON, **SMALL, intermediate_size=64),
    Gemma2Config(**COMMON, **HEADS, head_dim=8),
    Qwen3Config(**COMMON, **HEADS, head_dim=8),
]


def named(configs):
    return pytest.mark.parametrize("config", configs, ids=[type(c).__name__ for c in configs])


def language_of(config):
    language = tiny_language()
    return language if config is None else replace(language, model=build(config))


def found(language, layout, batch, trained, narrow, monkeypatch):
    """Loss and gradients, with the last layer's parts left alone or not."""
    torch.manual_seed(1)
    model = PackedVLM(language.model, layout=layout, image=Projector(ProjectorConfig(RandomFeatures.width, 32)))
    monkeypatch.setattr(packed_vlm, "WORTH", 1.0 if narrow else 0.0)
    model.zero_grad()
    loss = model(**batch)
    loss.backward()
    assert bool(model._last_parts) == narrow
    kept = [(name, p.grad) for name, p in model.named_parameters() if trained in name and p.grad is not None]
    assert kept
    return loss.item(), kept


@named([*ISOLATE, *MORE])
def test_parts_of_models_are_found(config):
    model = build(config).train()
    parts = find_positionwise_modules(model)
    assert len(parts) >= 2
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in parts)


@named([c for c in LEAK if not isinstance(c, BloomConfig)])
def test_models_of_other_forms_are_left_alone_or_right(config):
    model = build(config)
    ids, places = torch.arange(20).view(2, 10), torch.tensor([2, 9, 15])
    whole = model(input_ids=ids, use_cache=False).logits
    with compute_at_positions(find_positionwise_modules(model), places):
        alone = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(whole.flatten(0, 1)[places], alone.flatten(0, 1)[places], rtol=1e-3, atol=1e-4)


def test_a_part_that_wants_more_than_positions_leaves_the_layer_whole():
    assert find_positionwise_modules(build(next(c for c in LEAK if isinstance(c, BloomConfig)))) == []


@named([None, *ISOLATE, *MORE])
@pytest.mark.parametrize("kind", ["rows", "line", "alone"])
@pytest.mark.parametrize("trained", ["projectors", "language_model"])
def test_losses_and_gradients_are_those_of_the_whole_layer(config, kind, trained, monkeypatch):
    language = language_of(config)
    language.model.requires_grad_(trained == "language_model").eval()
    layout = Layout(kind, 32)
    samples = [encode(example(i, a, image=i != 2), language.prompt, 4, 200) for i, a in enumerate(ANSWERS)]
    batch = pack(samples, {"image": RandomFeatures()}, layout=layout)
    (loss, ours), (expected, theirs) = (
        found(language, layout, batch, trained, narrow, monkeypatch) for narrow in (True, False)
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    for (name, one), (same, other) in zip(ours, theirs, strict=True):
        assert name == same
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_answers_that_share_their_beginning_are_each_learned_once(monkeypatch):
    language = tiny_language()
    language.model.requires_grad_(True)
    samples = [encode(example(0, answer), language.prompt, 4, 200) for answer in ANSWERS]
    batch = pack(samples, {"image": RandomFeatures()}, share=True)
    assert len(batch["keep"].unique()) < len(batch["keep"])
    (loss, ours), (expected, theirs) = (
        found(language, Layout("rows"), batch, "", narrow, monkeypatch) for narrow in (True, False)
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    for (_, one), (_, other) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)


def test_an_adapter_learns_the_same(monkeypatch):
    language = tiny_language()
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), language.model)
    samples = [encode(example(i, a), language.prompt, 4, 200) for i, a in enumerate(ANSWERS)]
    batch = pack(samples, {"image": RandomFeatures()})
    (loss, ours), (expected, theirs) = (
        found(language, Layout("rows"), batch, "lora_", narrow, monkeypatch) for narrow in (True, False)
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    for (_, one), (_, other) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)


def rows_seen(model, batch, recompute=False):
    """Positions that the MLP of each layer computed in a step of training."""
    seen = []
    hooks = [
        layer.mlp.fc1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2).shape[0]))
        for layer in model.language_model.model.layers
    ]
    with model.recomputing(recompute):
        model.train()(**batch).backward()
    for hook in hooks:
        hook.remove()
    return seen


def test_the_last_layer_rests_where_nothing_is_predicted(monkeypatch):
    language = tiny_language()
    samples = [encode(example(i, a), language.prompt, 4, 200) for i, a in enumerate(ANSWERS)]
    batch = pack(samples, {"image": RandomFeatures()})
    whole, few = batch["input_ids"].numel(), len(batch["keep"])
    model = PackedVLM(language.model, image=Projector(ProjectorConfig(RandomFeatures.width, 32)))
    monkeypatch.setattr(packed_vlm, "WORTH", few / whole)
    rows_seen(model, batch)  # It is found out once.
    *before, last = rows_seen(model, batch)
    assert (before, last) == ([whole] * len(before), few)
    assert set(rows_seen(model, batch, recompute=True)) == {whole}
    monkeypatch.setattr(packed_vlm, "WORTH", few / whole - 1e-9)
    assert set(rows_seen(model, batch)) == {whole}
