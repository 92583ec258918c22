"""Attention of one token a row whose heads share keys: what sdpa gives."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mmphi.generation.kv_cache import SlotKVCache
from mmphi.models.patches.gqa_decode_attention import gqa_decode_attention
from mmphi.models.patches.module_patches import patched


class Layer(torch.nn.Module):
    is_causal = True

    def __init__(self, heads, groups):
        super().__init__()
        self.num_key_value_groups = heads // groups


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (6, 6), (6, 1)])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_it_gives_what_sdpa_gives(heads, groups, tokens, masked):
    torch.manual_seed(0)
    query = torch.randn(4, heads, tokens, 8)
    key, value = torch.randn(2, 4, groups, 9, 8)
    mask = torch.rand(4, 1, tokens, 9) < 0.6
    mask[..., 0] = True
    given = mask if masked else None
    own, _ = gqa_decode_attention(Layer(heads, groups), query, key, value, given, scaling=0.3, is_causal=False)
    theirs, _ = sdpa_attention_forward(Layer(heads, groups), query, key, value, given, scaling=0.3, is_causal=False)
    assert own.shape == (4, tokens, heads, 8)
    torch.testing.assert_close(own, theirs)


def model_of(**changes):
    torch.manual_seed(0)
    small = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(**small, num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=64, **changes)
    return LlamaForCausalLM(config).eval()


def test_a_model_says_token_by_token_what_it_says_at_once():
    model = model_of(attn_implementation="sdpa")
    ids = torch.randint(0, 64, (3, 7))
    with torch.inference_mode():
        expected = model(ids).logits
        slots, said = SlotKVCache(3, 16), []
        with patched(model, "decoding"):
            assert model.config._attn_implementation == "grouped"
            for place in range(7):
                given = slots.reading([0, 1, 2], [place] * 3, 1, torch.device("cpu"))
                said.append(model(input_ids=ids[:, place : place + 1], use_cache=True, **given).logits)
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(torch.cat(said, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_attends_otherwise_is_left_as_it_is():
    model = model_of(attn_implementation="eager")
    with patched(model, "decoding"):
        assert model.config._attn_implementation == "eager"
