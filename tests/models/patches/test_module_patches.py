from __future__ import annotations

import copy

import pytest
import torch
from builders import tiny_language
from torch import nn
from transformers import PhiForCausalLM
from transformers.activations import NewGELUActivation

from mmphi.models.language.phi import phi_config
from mmphi.models.patches.module_patches import apply_patches, remove_patches


@pytest.fixture
def phi() -> PhiForCausalLM:
    torch.manual_seed(0)
    return PhiForCausalLM(phi_config(2, 32, 4, 64, 300, 0)).eval()


def test_logits_and_gradients_are_those_of_transformers_model(phi: PhiForCausalLM) -> None:
    ours, ids = apply_patches(copy.deepcopy(phi)), torch.arange(40)[None]
    for model in (phi, ours):
        model(input_ids=ids, labels=ids).loss.backward()
    torch.testing.assert_close(ours(input_ids=ids).logits, phi(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    theirs = dict(phi.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_activation_keeps_one_tensor_for_its_gradient_and_states_stay_interchangeable(phi: PhiForCausalLM) -> None:
    ours = apply_patches(copy.deepcopy(phi))
    assert not any(isinstance(module, NewGELUActivation) for module in ours.modules())
    assert ours.state_dict().keys() == phi.state_dict().keys()
    assert ours.config.to_dict() == phi.config.to_dict()


def test_under_autocast_a_bf16_model_stays_bf16(phi: PhiForCausalLM) -> None:
    ours, seen = apply_patches(phi.to(torch.bfloat16)), []
    ours.model.layers[1].mlp.register_forward_hook(lambda _, given, out: seen.append((given[0].dtype, out)))
    with torch.autocast("cpu", torch.bfloat16):
        ours(input_ids=torch.arange(8)[None])
    ours(input_ids=torch.arange(8)[None])
    assert [(given, out.dtype) for given, out in seen] == [(torch.bfloat16, torch.bfloat16)] * 2
    torch.testing.assert_close(seen[0][1], seen[1][1], rtol=0.02, atol=0.02)


def test_a_model_that_is_loaded_has_them_once() -> None:
    model = tiny_language().model
    norms = [module for module in apply_patches(apply_patches(model)).modules() if isinstance(module, nn.LayerNorm)]
    assert all(len(norm._forward_hooks) == 1 for norm in norms)


def test_undone_it_is_transformers_model_to_the_bit(phi: PhiForCausalLM) -> None:
    ids, expected = torch.arange(40)[None], copy.deepcopy(phi)
    undone = remove_patches(apply_patches(phi))
    assert torch.equal(undone(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert not any(module._forward_hooks for module in undone.modules())
    assert any(isinstance(module, NewGELUActivation) for module in undone.modules())
