"""A model in transformers' LLaVA classes says what it says here; shapes that LLaVA has not are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from builders import byte_tokenizer, tiny_language
from torch import nn
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from mmphi.config import LanguageSettings, VisionSettings
from mmphi.data.features import LiveFeatures
from mmphi.errors import ModelError
from mmphi.models.export.llava_check import QUESTIONS, check_pictures, compare_outputs, expected_outputs
from mmphi.models.export.llava_export import as_llava, fold_head_bias, save_llava
from mmphi.models.language.language_model import LanguageModel
from mmphi.models.multimodal import Multimodal
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.models.vision.clip_vision import clip_vision
from mmphi.models.vision.vision_encoder import VisionEncoder, VisionReference
from mmphi.text.prompt import Prompt

CHAT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def vit(**changes: object) -> nn.Module:
    """A small ViT of open_clip's, with weights that make its tokens differ."""
    torch.manual_seed(3)
    shape = {"layers": 3, "width": 32, "patch_size": 8, "image_size": 32, "head_width": 16, **changes}
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    open_clip.factory._MODEL_CONFIGS["small-vit"] = {"embed_dim": 8, "vision_cfg": shape, "text_cfg": text}
    visual = open_clip.create_model("small-vit", pretrained=None).visual.eval()
    for parameter in visual.parameters():
        nn.init.normal_(parameter, std=0.3)
    return visual


def phi(style: str = "plain", **changes: object) -> LanguageModel:
    """A Phi whose head has a bias, and whose last norm has a scale and a bias."""
    language = tiny_language(**changes)
    for parameter in (language.model.lm_head.bias, language.model.model.final_layernorm.bias):
        nn.init.normal_(parameter, std=0.5)
    nn.init.uniform_(language.model.model.final_layernorm.weight, 0.5, 2)
    return replace(language, prompt=Prompt(language.tokenizer, style))


def llama() -> LanguageModel:
    """A chat model whose embeddings are its head, and whose vocabulary is full."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=4, tie_word_embeddings=True, initializer_range=0.2)
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    settings = LanguageSettings(model="llama", prompt="chat")
    return LanguageModel(model, tokenizer, Prompt(tokenizer, "chat"), 32, "llama", "0", settings)


def joined(language: LanguageModel, visual: nn.Module | None = None, **settings: object) -> Multimodal:
    """A model that sees, with random weights."""
    projector = {name: settings.pop(name) for name in ("layers", "width", "norm") if name in settings}
    chosen = VisionSettings(model="small-vit", **{"layer": -2, **settings})
    encoder = VisionEncoder(visual or vit(), chosen)
    torch.manual_seed(4)
    return Multimodal(
        language,
        Projector(ProjectorConfig(encoder.width, 32, **projector)),
        LiveFeatures(encoder),
        max_length=128,
        vision=VisionReference(chosen, encoder.digest),
    )


@pytest.mark.parametrize(
    ("language", "changes"),
    [
        (lambda: phi(), {}),
        (lambda: phi("phi"), {"layer": -1, "cls": "keep"}),
        (lambda: phi(vocab_size=257), {"layer": -3}),  # No row is free for the image token.
        (llama, {}),
    ],
    ids=["plain", "phi", "full vocabulary", "chat and tied"],
)
def test_exported_and_loaded_again_it_says_the_same(language, changes, tmp_path: Path):
    model = joined(language(), **changes)
    images = check_pictures()
    expected = expected_outputs(model, images, QUESTIONS)
    answers = [model.ask(question, _saved(image, tmp_path)) for image, question in zip(images, QUESTIONS, strict=True)]
    save_llava(*as_llava(model), tmp_path / "llava")
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "llava", use_fast=False)
    found = compare_outputs(loaded, processor, expected, images, QUESTIONS)
    assert found.logits < 1e-4 * expected[0].logits.std()
    assert found.tokens == 0
    assert found.pixels < 0.01
    spread = torch.stack([e.logits[-1] for e in expected]).std(dim=0).mean()
    assert spread > 0.01  # The questions and images are told apart.
    assert [_answer(loaded, processor, *each) for each in zip(images, QUESTIONS, strict=True)] == answers


def _saved(image, folder: Path) -> Path:
    path = folder / f"{image.size}.png"
    image.save(path)
    return path


def _answer(model, processor, image, question: str) -> str:
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    inputs = processor(images=[image], text=[text], add_special_tokens=False, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(answer, skip_special_tokens=True).strip()


@pytest.mark.parametrize("make", [lambda: phi(), lambda: phi("phi"), llama], ids=["plain", "phi", "chat"])
def test_the_template_writes_several_turns_as_they_were_trained(make):
    language = make()
    turns = [("what is it?", "a dog"), ("and where?", "left")]
    model = joined(language)
    parts = language.prompt.parts(turns, images=1)
    ours = [0 if part.span else token for part in parts for token in (part.ids or [0])]
    _, processor = as_llava(model)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": turns[0][0]}]},
        {"role": "assistant", "content": turns[0][1]},
        {"role": "user", "content": [{"type": "text", "text": turns[1][0]}]},
        {"role": "assistant", "content": [{"type": "text", "text": turns[1][1]}]},
    ]
    text = processor.apply_chat_template(messages)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert [0 if token == image else token for token in ids] == ours


def test_a_role_that_was_never_trained_is_refused():
    _, processor = as_llava(joined(phi()))
    with pytest.raises(Exception, match="without messages of the role system"):
        processor.apply_chat_template([{"role": "system", "content": "be brief"}])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_bias_of_the_head_is_folded_into_its_weights(scale: float):
    torch.manual_seed(0)
    norm, head = nn.LayerNorm(24), nn.Linear(24, 50)
    nn.init.uniform_(norm.weight, -2, 2)
    nn.init.normal_(norm.bias, std=scale)
    hidden = torch.randn(7, 24)
    with torch.no_grad():
        expected = head(norm(hidden))
        plain = fold_head_bias(norm, head)
        assert torch.allclose(plain(norm(hidden)), expected, atol=2e-5 * max(1, scale))
        assert plain.bias is None
        assert plain.weight.abs().max() < 3 * max(1.0, scale) * head.weight.abs().max()


def test_a_bias_after_another_norm_is_refused():
    with pytest.raises(ModelError, match="RMSNorm before it cannot replace it"):
        fold_head_bias(nn.RMSNorm(8), nn.Linear(8, 9))


@pytest.mark.parametrize(
    ("changes", "said_so"),
    [
        ({"layers": 3}, "3 layers, LLaVA's has 2"),
        ({"norm": True}, "normalises its input"),
        ({"width": 48}, "48 wide inside, LLaVA's is as wide as the language model: 32"),
        ({"pool": 2}, "vision.pool = 2, but LLaVA does not pool patches"),
    ],
)
def test_shapes_that_llava_has_not(changes, said_so):
    with pytest.raises(ModelError, match=said_so):
        as_llava(joined(phi(), **changes))


@pytest.mark.parametrize("name", ["RN50", "ViT-B-16-SigLIP"])
def test_towers_that_are_no_clip_vit(name: str):
    with torch.device("meta"):
        visual = open_clip.create_model(name, pretrained=None, device="meta").visual
    with pytest.raises(ModelError, match=r"the vision encoder is a \w+, and LLaVA's is a CLIP ViT"):
        clip_vision(visual)


def test_parts_that_a_clip_vit_has_not():
    with pytest.raises(ModelError, match="has weights that a CLIP ViT does not have"):
        clip_vision(vit(ls_init_value=0.1))
