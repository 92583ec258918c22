"""A language model that is lent comes back as it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from builders import RandomFeatures, Recorder, encode, example, tiny_language
from transformers import OPTConfig, OPTForCausalLM, PhiConfig, PhiForCausalLM

from mmphi.config import TrainingSettings
from mmphi.models.packed_vlm import PackedVLM
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.text.packing import pack
from mmphi.training.packed_dataset import packed_dataset
from mmphi.training.trainer import train


def traces(model: torch.nn.Module) -> list:
    """Everything on a model that somebody might leave behind."""
    return [
        (
            name,
            module.training,
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            sorted(k for k in vars(module) if k == "forward" or "checkpoint" in k),
            getattr(module, "gradient_checkpointing", None),
        )
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("recompute", [False, True])
def test_training_leaves_nothing_behind(tmp_path, recompute):
    language = tiny_language()
    before, forward = traces(language.model), type(language.model).forward
    model = PackedVLM(language.model, image=Projector(ProjectorConfig(RandomFeatures.width, 32)))
    samples = [encode(example(i, "a dog"), language.prompt, 4, 100) for i in range(4)]
    settings = TrainingSettings(steps=2, batch_size=2, precision="bf16", gradient_checkpointing=recompute)
    with model.recomputing(recompute):
        train(
            model,
            packed_dataset(samples, {"image": RandomFeatures()}, settings),
            settings,
            folder=tmp_path,
            tracker=Recorder(),
            title="test",
        )
    model.eval()
    after = traces(language.model)
    assert [t[:4] for t in after] == [t[:4] for t in before]
    assert not any(t[5] for t in after)
    assert type(language.model).forward is forward
    assert "forward" not in vars(model)
    # No autocast stays: the same arithmetic as before, on other weights of the projector alone.
    fresh = PackedVLM(tiny_language().model, image=copy.deepcopy(model.projectors["image"]))
    rows = pack(samples, {"image": RandomFeatures()})
    assert torch.equal(model(**rows), fresh(**rows))


def phi2_small() -> PhiForCausalLM:
    """Phi-2's own configuration, made small: it drops 0.1 of what leaves every layer."""
    own = {"resid_pdrop": 0.1, "embd_pdrop": 0.0, "attention_dropout": 0.0, "partial_rotary_factor": 0.4}
    given = Path(__file__).resolve().parents[3] / "shared" / "real" / "phi-2" / "config.json"
    if given.exists():
        own = {k: v for k, v in json.loads(given.read_text()).items() if "drop" in k or k == "partial_rotary_factor"}
    small = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return PhiForCausalLM(PhiConfig(**own, **small, num_attention_heads=1, initializer_range=0.2))


def opt_small() -> OPTForCausalLM:
    """A model whose layers drop by a rate of their own and not by a module."""
    config = OPTConfig(
        vocab_size=260, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    assert config.dropout == 0.1
    return OPTForCausalLM(config)


@pytest.mark.parametrize("make", [phi2_small, opt_small])
@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_model_never_drops(make, recompute):
    torch.manual_seed(0)
    inner = make().requires_grad_(False).eval()
    language = tiny_language()
    model = PackedVLM(inner, image=Projector(ProjectorConfig(RandomFeatures.width, 32)))
    samples = [encode(example(i, "a dog"), language.prompt, 4, 100) for i in range(3)]
    rows = pack(samples, {"image": RandomFeatures()})
    expected = model.eval()(**rows)
    calls = []
    inner.get_decoder().layers[0].register_forward_pre_hook(lambda module, _: calls.append(module.training))
    with model.recomputing(recompute):
        model.train()
        loss = model(**rows)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        assert calls[-1] == recompute
    gradients = [p.grad.clone() for p in model.projectors.parameters()]
    model.zero_grad()
    model.eval()(**rows).backward()
    for one, other in zip(gradients, (p.grad for p in model.projectors.parameters()), strict=True):
        torch.testing.assert_close(one, other)
    assert not any(module.training for module in inner.modules())
