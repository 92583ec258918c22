from __future__ import annotations

from collections import namedtuple

import psutil
import pytest
import torch
from builders import byte_tokenizer, tiny_language

from mmphi.config import LanguageSettings
from mmphi.models.language.adapter import AdapterConfig, adapter_parameters, add_adapter, merge_adapter
from mmphi.models.language.language_model import LanguageModel, load_language_model
from mmphi.models.patches.dequantized_linear import dequantize_layers_once

CPU = torch.device("cpu")
IDS = torch.arange(40).view(2, 20)


@pytest.fixture
def folder(tmp_path):
    tiny_language(hidden_size=64, intermediate_size=128).model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that holds no weights twice."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: namedtuple("Memory", "available")(1000))


def load(folder) -> LanguageModel:
    return load_language_model(LanguageSettings(model=str(folder), precision="4bit"), None, CPU)


def learned(language: LanguageModel) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits with an adapter that is not nothing, and its gradients."""
    language = add_adapter(language, AdapterConfig(rank=4, alpha=8))
    torch.manual_seed(1)
    parameters = list(adapter_parameters(language).values())
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.2)
    logits = language.model(IDS).logits
    return logits, list(torch.autograd.grad(logits.square().mean(), parameters))


def held(language: LanguageModel) -> int:
    return sum("forward" in vars(module) for module in language.model.modules())


@pytest.mark.usefixtures("short")
def test_outputs_and_gradients_are_those_of_bitsandbytes(folder, monkeypatch):
    plain = load(folder)
    assert held(plain) == 0  # Where memory is short, they stay quantised alone.
    expected, their_gradients = learned(plain)
    monkeypatch.undo()
    found = load(folder)
    assert held(found) == 2 * 6  # Four matrices of attention and two of the MLP, in two layers.
    monkeypatch.setattr("bitsandbytes.nn.modules.Linear4bit.forward", lambda *_: pytest.fail("dequantised again"))
    logits, gradients = learned(found)
    assert torch.allclose(logits, expected, atol=1e-5)
    for one, other in zip(gradients, their_gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_the_layers_are_saved_and_merged_as_they_were(folder, request):
    found = load(folder)
    request.getfixturevalue("short")
    plain = load(folder)
    theirs = plain.model.state_dict()
    assert found.model.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in found.model.state_dict().items())
    assert torch.equal(
        merge_adapter(plain, torch.float32).model(IDS).logits, merge_adapter(found, torch.float32).model(IDS).logits
    )


def test_other_precisions_are_left_alone():
    language = tiny_language()
    assert dequantize_layers_once(language.model) is language.model
    assert held(language) == 0
