from __future__ import annotations

import copy

import pytest
import torch
from builders import tiny_language
from torch import nn
from transformers import PhiForCausalLM
from transformers.activations import NewGELUActivation

from mmphi.models.language.phi import phi_config
from mmphi.models.patches.module_patches import PATCHES, apply_patches, patched, remove_patches


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


def state_of(model: nn.Module) -> tuple[str, list[str], list[type], int]:
    """What patches change: attention implementation, layers with a forward of their own, activations and hooks."""
    own = [name for name, module in model.named_modules() if "forward" in vars(module)]
    kinds = [type(module) for module in model.modules()]
    return model.config._attn_implementation, own, kinds, sum(len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("purpose", list(PATCHES))
def test_every_patch_is_removed_alone_and_by_removing_all(phi: PhiForCausalLM, purpose: str) -> None:
    before = state_of(phi)
    with patched(phi, purpose):
        assert state_of(phi) != before
    assert state_of(phi) == before
    assert state_of(remove_patches(apply_patches(phi, purpose), purpose)) == before
    assert state_of(remove_patches(apply_patches(phi, purpose))) == before


@pytest.mark.parametrize("purpose", list(PATCHES))
def test_a_context_within_applied_patches_leaves_them_applied(phi: PhiForCausalLM, purpose: str) -> None:
    applied = state_of(apply_patches(phi, purpose))
    with patched(phi, purpose):
        assert state_of(phi) == applied
    assert state_of(phi) == applied


def test_patches_of_one_purpose_stay_when_those_of_another_are_removed(phi: PhiForCausalLM) -> None:
    loaded = state_of(apply_patches(phi))
    for purpose in ("training", "decoding"):
        with patched(phi, purpose):
            pass
        assert state_of(phi) == loaded


def test_patches_are_removed_after_an_error(phi: PhiForCausalLM) -> None:
    before = state_of(phi)
    with pytest.raises(RuntimeError, match="out of memory"), patched(phi, "decoding"):
        raise RuntimeError("out of memory")
    assert state_of(phi) == before


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_former_attention_is_restored(phi: PhiForCausalLM, implementation: str) -> None:
    phi.set_attn_implementation(implementation)
    with patched(phi, "training"):
        assert phi.config._attn_implementation == "documents"
    assert phi.config._attn_implementation == implementation
