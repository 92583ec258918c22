"""Layers that torch compiles learn the same; validation is not compiled, and nothing is left behind."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from builders import RandomFeatures, encode, example, tiny_language

from mmphi.models.language.compiling import compiled_layers, should_compile
from mmphi.models.packed_vlm import PackedVLM
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.text.packing import Layout, pack

BATCHES = (["a dog", "two men on a bench"], ["snow", "b" * 40, "it rains"])


def packed_model(language, layout="line"):
    torch.manual_seed(1)
    projector = Projector(ProjectorConfig(RandomFeatures.width, 32))
    return PackedVLM(language.model, layout=Layout(layout), image=projector)


def learned(model, language):
    """Losses of batches of different lengths, and what the projector would learn."""
    losses = []
    for answers in BATCHES:
        samples = [encode(example(i, a), language.prompt, 4, 200) for i, a in enumerate(answers)]
        loss = model.train()(**pack(samples, {"image": RandomFeatures()}, layout=model.layout))
        loss.backward()
        losses.append(loss.item())
    return losses, [p.grad for p in model.projectors.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["line", "rows"])
def test_it_learns_the_same(monkeypatch, layout):
    calls = []

    def backend(graph, inputs):
        def run(*args):
            calls.append(1)
            return graph(*args)

        return run

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    language = tiny_language()
    expected, gradients = learned(packed_model(language, layout), language)
    model = packed_model(language, layout)
    with compiled_layers(model, True, pytest.fail):
        calls.clear()
        losses, own = learned(model, language)
        assert calls
        calls.clear()
        samples = [encode(example(0, "a dog"), language.prompt, 4, 200)]
        model.eval()(**pack(samples, {"image": RandomFeatures()}, layout=Layout(layout)))
        assert not calls
    assert losses == pytest.approx(expected, rel=1e-5)
    for ours, theirs in zip(own, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    model.train()
    learned(model, language)
    assert not calls
    assert all(getattr(m, "_compiled_call_impl", None) is None for m in language.model.modules())


def test_trying_it_out_changes_nothing(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    language = tiny_language()
    model = packed_model(language).eval()
    before = torch.get_rng_state()
    with compiled_layers(model, True, pytest.fail):
        assert not model.training
        assert torch.equal(torch.get_rng_state(), before)
        assert all(p.grad is None for p in model.parameters())


def test_where_it_does_not_work_that_is_told(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("\nno C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    said, language = [], tiny_language()
    model = packed_model(language).eval()
    with compiled_layers(model, True, said.append):
        assert not model.training
        learned(model, language)
    assert said == ["torch.compile does not work here (no C++ compiler): continuing without it"]


def test_it_is_worth_it_where_it_was_measured():
    model = packed_model(tiny_language())
    assert should_compile("yes", model, 1)
    assert not should_compile("no", model, 1000)
    assert not should_compile("auto", model, 1000)  # On a processor.
