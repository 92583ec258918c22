from __future__ import annotations

import json
import math
import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import PhiConfig, PhiForCausalLM

from mmphi.models.language import linear_cross_entropy as lce
from mmphi.models.language.causal_lm_task import CausalTask, isolation_error, probe, smoke_test
from mmphi.models.language.phi import SIZES, count_parameters, phi_config, size_config, training_flops
from mmphi.models.patches.module_patches import patched

LENGTHS = [7, 1, 20, 4]


def model() -> PhiForCausalLM:
    torch.manual_seed(0)
    config = phi_config(2, 32, 4, 64, 97, 0, tied=True)
    config.initializer_range = 0.3
    return PhiForCausalLM(config)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_loss_and_gradients_are_those_of_all_logits(scale, bias, monkeypatch):
    monkeypatch.setattr(lce, "CHUNK", 8)
    torch.manual_seed(0)
    hidden, weight = torch.randn(33, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    offset = torch.randn(50, requires_grad=True) if bias else None
    targets = torch.randint(0, 50, (33,))
    inputs = [x for x in (hidden, weight, offset) if x is not None]
    expected = F.cross_entropy(F.linear(hidden, weight, offset), targets, reduction="sum")
    found = lce.linear_cross_entropy(hidden, weight, offset, targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    both = zip(torch.autograd.grad(scale * found, inputs), torch.autograd.grad(scale * expected, inputs), strict=True)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in both)


def test_loss_alone_needs_no_gradient():
    hidden, weight, targets = torch.randn(9, 4), torch.randn(7, 4), torch.randint(0, 7, (9,))
    found = lce.linear_cross_entropy(hidden, weight, None, targets)
    assert not found.requires_grad
    assert found.item() == pytest.approx(F.cross_entropy(hidden @ weight.T, targets, reduction="sum").item(), rel=1e-5)


def test_loss_under_autocast_is_near(monkeypatch):
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (40,))
    expected = F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        found = lce.linear_cross_entropy(hidden, weight, None, targets)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=0.02)
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("walls", ["documents", "mask"])
def test_documents_of_a_row_are_as_they_are_alone(walls):
    """Losses and gradients, against transformers' own forward pass of each document."""
    language = model()
    ids = torch.randint(0, 97, (sum(LENGTHS) + 1,))
    expected = torch.tensor(0.0)
    start = 0
    for length in LENGTHS:
        part = ids[start : start + length + 1]
        logits = language(input_ids=part[None, :-1], use_cache=False).logits[0]
        expected = expected + F.cross_entropy(logits, part[1:], reduction="sum")
        start += length
    wanted = torch.autograd.grad(expected, list(language.parameters()))
    with patched(language, "training"):
        task = CausalTask(language, walls=walls)
        found = task(**probe(ids, LENGTHS))
        got = torch.autograd.grad(found, list(language.parameters()))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(got, wanted, strict=True))
    assert language.config._attn_implementation == "sdpa"


def test_recomputing_changes_nothing():
    language = model()
    ids = torch.randint(0, 97, (sum(LENGTHS) + 1,))
    gradients = []
    with patched(language, "training"):
        task = CausalTask(language).train()
        for again in (False, True):
            if again:
                enable = getattr(language, "activation_checkpointing_enable", None)  # transformers 5.23 and later.
                (enable or language.gradient_checkpointing_enable)({"use_reentrant": False})
            gradients.append(torch.autograd.grad(task(**probe(ids, LENGTHS)), list(language.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_walls_that_do_not_hold_are_found(monkeypatch):
    language = model()
    with patched(language, "training"):
        task = CausalTask(language)
        assert isolation_error(task) < 1e-5
        one = CausalTask.hidden
        monkeypatch.setattr(task, "hidden", lambda batch: one(task, {**batch, "borders": batch["borders"][[0, -1]]}))
        assert isolation_error(task) > 1e-3
    assert isolation_error(CausalTask(language)) == math.inf  # Not attending inside documents: it cannot be computed.


@pytest.mark.slow
def test_compiled_is_as_it_is(monkeypatch):
    """Traced whole, with gradients; generating C++ takes half a minute and is torch's own matter."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    language = model()
    task = CausalTask(language, walls="mask", compiled=True)
    smoke_test(task, 16)
    ids = torch.randint(0, 97, (17,))
    batch = probe(ids, [9, 7])
    compiled = task.train()(**batch).item()
    assert compiled == pytest.approx(CausalTask(language, walls="mask")(**batch).item(), rel=1e-5)


def test_generating_is_transformers_own():
    language = model().eval()
    ids = torch.arange(5)[None]
    expected = language.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    with patched(language, "training"):
        assert torch.equal(language.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_as_they_are(tied):
    config = phi_config(3, 64, 4, 32, 101, 0, tied=tied)
    assert count_parameters(config).total == sum(p.numel() for p in PhiForCausalLM(config).parameters())


@pytest.mark.parametrize("size", SIZES)
def test_every_size_runs(size):
    """One layer of it, on a few tokens."""
    config = size_config(size, vocabulary=64)
    config.num_hidden_layers = 1
    with torch.no_grad():
        assert PhiForCausalLM(config)(torch.arange(8)[None]).logits.isfinite().all()


def test_sizes_are_what_they_are_called():
    totals = {name: count_parameters(size_config(name)).total for name in SIZES}
    assert totals["phi-2"] == 2_779_683_840  # Phi-2's own count.
    for name in ("10M", "30M", "124M", "350M"):
        assert totals[name] == pytest.approx(float(name[:-1]) * 1e6, rel=0.03)
    assert totals["1.3B"] == pytest.approx(1.3e9, rel=0.1)  # Phi-1.5 is called so, and has 1.42B.
    assert count_parameters(size_config("1M", vocabulary=2048)).total == pytest.approx(1e6, rel=0.1)


@pytest.mark.skipif("MMPHI_REAL" not in os.environ, reason="needs Phi-2's own config.json")
@pytest.mark.real
def test_phi2_is_phi2():
    given = json.loads((Path(os.environ["MMPHI_REAL"]) / "phi-2" / "config.json").read_text())
    own, real = size_config("phi-2").to_dict(), PhiConfig(**given).to_dict()
    said_by_files = {"architectures", "auto_map", "_name_or_path", "dtype", "torch_dtype", "transformers_version"}
    assert {k: v for k, v in own.items() if k not in said_by_files} == {
        k: v for k, v in real.items() if k not in said_by_files
    }


def test_flops_are_those_that_torch_counts():
    """Its counter sees every product; forward and backward are three times forward."""
    from torch.utils.flop_counter import FlopCounterMode

    config = phi_config(2, 64, 4, 64, 128, 0)
    config._attn_implementation = "eager"
    language = PhiForCausalLM(config)
    with FlopCounterMode(display=False) as counter:
        language(input_ids=torch.arange(32)[None], use_cache=False).logits.sum().backward()
    whole = 32 * 32  # Eager attention computes all pairs.
    # The first layer's input needs a gradient, because the embedding learns.
    assert training_flops(config, 32, whole) == pytest.approx(counter.get_total_flops(), rel=0.02)
