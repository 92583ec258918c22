from __future__ import annotations

import json

import pytest
import torch
from builders import byte_tokenizer, tiny_language
from safetensors.torch import load_file, save_file
from transformers import PhiConfig, PhiForCausalLM

from mmphi.config import LanguageSettings
from mmphi.errors import ModelError
from mmphi.models.language.language_model import disable_bnb_repacking, load_language_model
from mmphi.models.language.phi import phi_config
from mmphi.models.patches.module_patches import apply_patches

CPU = torch.device("cpu")
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes quantises blocks of 64


@pytest.fixture
def folder(tmp_path):
    language = tiny_language(**WIDE)
    language.model.save_pretrained(tmp_path / "lm")
    byte_tokenizer().save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def logits(model):
    return model(torch.arange(20)[None]).logits


def test_from_a_folder_equal_and_frozen(folder):
    found = load_language_model(LanguageSettings(model=str(folder)), None, CPU)
    assert torch.equal(logits(found.model), logits(apply_patches(tiny_language(**WIDE).model)))
    assert not any(p.requires_grad for p in found.model.parameters())
    assert not found.model.training
    assert found.width == 64
    assert found.prompt.style == "plain"


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.05), ("8bit", 0.1), ("4bit", 0.6)])
def test_other_precisions_stay_near(folder, precision, bound):
    """Distance in the logits, relative to their own spread."""
    found = load_language_model(LanguageSettings(model=str(folder), precision=precision), None, CPU)
    exact = logits(tiny_language(**WIDE).model)
    assert (logits(found.model).float() - exact).std() < bound * exact.std()


def test_embeddings_are_those_that_the_first_layer_gets(tmp_path):
    """Gemma's embedding module multiplies its table by the square root of the width."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = Gemma3TextConfig(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=1, pad_token_id=0, **heads
    )
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    byte_tokenizer().save_pretrained(tmp_path / "gemma")
    found = load_language_model(LanguageSettings(model=str(tmp_path / "gemma")), None, CPU)
    seen = []
    found.model.model.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    found.model(torch.tensor([[5, 9, 250]]))
    torch.testing.assert_close(found.embeddings([5, 9, 250]), seen[0][0])
    torch.testing.assert_close(found.embeddings()[9], seen[0][0, 1])
    assert found.embeddings([]).shape == (0, 64)
    assert found.embeddings([5]).norm() > 7 * found.model.get_input_embeddings().weight[5].norm()


def test_random_weights_from_a_configuration(tmp_path):
    config = PhiConfig(
        vocab_size=51200, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    for precision in ("fp32", "4bit"):
        chosen = LanguageSettings(model=str(tmp_path / "config.json"), tokenizer="phi-2", precision=precision)
        found = load_language_model(chosen, None, CPU)
        assert found.prompt.style == "phi"
        assert found.model.config.vocab_size == 51200
        assert torch.isfinite(logits(found.model)).all()


def test_bias_free_layers_can_be_quantised(tmp_path):
    from transformers import LlamaConfig

    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(LlamaConfig(vocab_size=51200, **shape).to_dict()))
    chosen = LanguageSettings(model=str(tmp_path / "config.json"), tokenizer="phi-2", precision="4bit")
    assert torch.isfinite(logits(load_language_model(chosen, None, CPU).model)).all()


def test_weights_that_are_not_finite_are_named(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.fc1.bias"][3] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.fc1\.bias are not finite"):
        load_language_model(LanguageSettings(model=str(folder)), None, CPU)


def test_missing_models_say_what_to_do(tmp_path, folder):
    with pytest.raises(ModelError, match="no such folder, and it cannot be downloaded from the hub") as caught:
        load_language_model(LanguageSettings(model="nobody/nothing"), None, CPU)
    assert "give the path of a folder" in caught.value.hint
    with pytest.raises(ModelError, match="there is no pretrained model"):
        load_language_model(LanguageSettings(), None, CPU)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_language_model(LanguageSettings(model=str(folder)), None, CPU)


def test_tokenizer_with_too_many_tokens_is_refused(folder):
    with pytest.raises(ModelError, match="50295 tokens"):
        load_language_model(LanguageSettings(model=str(folder), tokenizer="phi-2"), None, CPU)


def test_phi_config_is_phi2s_at_its_size():
    config = phi_config(32, 2560, 32, 2048, 51200, 50256)
    assert config.intermediate_size == 10240
    model = PhiForCausalLM(phi_config(1, 320, 4, 64, 100, 0))
    assert model.model.rotary_emb.inv_freq.shape == (16,)  # 0.4 of 80, in pairs: as in Phi-2
    assert config.num_key_value_heads == 32


def test_four_bits_give_gradients_after_an_answer():
    """bitsandbytes would repack them on a CPU with AVX-512, for a kernel that has none."""
    from bitsandbytes.nn import Linear4bit

    layer = disable_bnb_repacking(
        Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu").eval()
    )
    inputs = torch.randn(3, 64, requires_grad=True)
    before, after = [], []
    for found in (before, after):
        found += [layer(inputs), *torch.autograd.grad(layer(inputs).sum(), inputs)]
        with torch.no_grad():
            layer(inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_no_bar_is_shown_for_a_folder_and_bars_are_shown_again_afterwards(folder, capsys):
    from transformers.utils import logging as transformers_logging

    load_language_model(LanguageSettings(model=str(folder)), None, torch.device("cpu"))
    assert "Loading weights" not in capsys.readouterr().err
    assert transformers_logging.is_progress_bar_enabled()
