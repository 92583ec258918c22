"""Export to the classes of transformers: ``LlavaForConditionalGeneration`` and its processor.

LLaVA in transformers has a CLIP ViT, a projector of two layers as wide as the language model, and a head without bias.
Models of other shapes are refused with the reason. The stage ``export`` compares the result with the original before it
writes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmphi.errors import ModelError
from mmphi.models.language.language_model import LanguageModel
from mmphi.models.multimodal import Multimodal
from mmphi.models.patches.module_patches import remove_patches
from mmphi.models.projector import ProjectorConfig
from mmphi.models.vision.clip_vision import clip_vision, image_processor
from mmphi.text.llava_chat_template import llava_template
from mmphi.text.prompt import MARK

UNFIT = "transformers' LLaVA does not support this architecture: use mmphi.load, or train a model that it supports"


def check_projector(config: ProjectorConfig) -> None:
    """Check that LLaVA can represent a projector.

    Raises:
        ModelError: If it cannot, with the reason.
    """
    if config.kind != "mlp":
        raise ModelError(f"the projector is of kind {config.kind}, LLaVA's is an MLP", UNFIT)
    if config.layers != 2:
        raise ModelError(f"the projector has {config.layers} layers, LLaVA's has 2", UNFIT)
    if config.norm:
        raise ModelError("the projector normalises its input (projector.norm), LLaVA's does not", UNFIT)
    if config.width not in (0, config.output_width):
        raise ModelError(
            f"the projector is {config.width} wide inside, LLaVA's is as wide as the language model: "
            f"{config.output_width}",
            UNFIT,
        )


@torch.no_grad()
def fold_head_bias(norm: nn.LayerNorm, head: nn.Linear) -> nn.Linear:
    """Head without bias that gives the same logits after the norm; the norm's bias is changed in place.

    The outputs of a LayerNorm with scale g lie in a plane: their dot product with a = 1/g is the same for every input,
    because normalised values sum to 0. So a multiple of a, added to a row of the head, adds a constant to its logit,
    which can replace its bias. The norm's bias is shifted along a so that the dot product is the length of a, which
    keeps the magnitude of the head's weights.

    Args:
        norm: Last norm, before the head.
        head: Output head in fp32, with a bias.

    Raises:
        ModelError: If the norm is not a LayerNorm with a nonzero scale.
    """
    if type(norm) is not nn.LayerNorm or norm.weight is None or not bool((norm.weight.abs() > 1e-6).all()):
        raise ModelError(
            f"the head of the language model has a bias, LLaVA's has none, and {type(norm).__name__} before it"
            " cannot replace it",
            UNFIT,
        )
    a = 1 / norm.weight.double()
    bias = torch.zeros_like(a) if norm.bias is None else norm.bias.double()
    length = a.norm()
    moved = a * (length - a @ bias) / length**2  # So that a @ (bias + moved) is the length of a.
    weight, old = head.weight.double(), head.bias.double()
    constant = (old - weight @ moved) / length
    plain = nn.Linear(head.in_features, head.out_features, bias=False, dtype=head.weight.dtype)
    plain.weight = nn.Parameter((weight + constant[:, None] * a).to(head.weight.dtype), requires_grad=False)
    norm.bias = nn.Parameter((bias + moved).to(norm.weight.dtype), requires_grad=False)
    return plain


def image_token(language: LanguageModel) -> int:
    """Token ID of ``<image>``, which is added to the tokenizer if missing."""
    from tokenizers import AddedToken

    tokenizer = language.tokenizer
    if MARK not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(MARK, special=True, normalized=False)], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids(MARK))


@torch.no_grad()
def as_llava(model: Multimodal) -> tuple[Any, Any]:
    """Convert a model to transformers' LLaVA classes.

    Args:
        model: Model in fp32, unquantised and without an adapter. Its language model and tokenizer are changed in place
            and become part of the result.

    Returns:
        ``LlavaForConditionalGeneration`` and ``LlavaProcessor``.

    Raises:
        ModelError: If transformers' LLaVA cannot represent the model, with the reason.
    """
    from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    if model.projector is None or model.vision is None or model.features is None:
        raise ModelError("the model has no projector", "export the run of a projector, qlora or merge")
    check_projector(model.projector.config)
    if model.vision.settings.pool != 1:
        raise ModelError(f"vision.pool = {model.vision.settings.pool}, but LLaVA does not pool patches", UNFIT)
    encoder = getattr(model.features, "encoder", None)
    if encoder is None:
        raise ModelError("the vision encoder is not loaded", "load the model without stored features")
    vision, language = clip_vision(encoder.visual), model.language
    template = llava_template(language.prompt)
    token = image_token(language)
    head = _head(language, token)
    text = language.model.config
    text.vocab_size, text.architectures = head.weight.shape[0], [type(language.model).__name__]
    keep = "full" if model.vision.settings.cls == "keep" else "default"
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=text,
        image_token_index=token,
        projector_hidden_act=model.projector.config.activation,
        vision_feature_select_strategy=keep,
        vision_feature_layer=model.vision.settings.layer,
        image_seq_length=encoder.tokens,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    with torch.device("meta"):
        exported = LlavaForConditionalGeneration(config)
    exported.model.vision_tower = vision
    # Without patches, the comparison tests the model as transformers loads it.
    exported.model.language_model = getattr(remove_patches(language.model), language.model.base_model_prefix)
    exported.model.multi_modal_projector = LlavaMultiModalProjector(config)
    first, second = (layer for layer in model.projector.layers if isinstance(layer, nn.Linear))
    projector = exported.model.multi_modal_projector
    projector.linear_1.load_state_dict(first.state_dict())
    projector.linear_2.load_state_dict(second.state_dict())
    exported.lm_head = head
    ends = language.ends
    exported.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=ends[0], bos_token_id=language.tokenizer.bos_token_id, suppress_tokens=[token]
    )
    tokenizer = language.tokenizer
    tokenizer.padding_side = "left"  # Answers are generated at the end of a row.
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    processor = LlavaProcessor(
        image_processor=image_processor(encoder.visual),
        tokenizer=tokenizer,
        patch_size=vision.config.patch_size,
        vision_feature_select_strategy=keep,
        num_additional_image_tokens=1,
        chat_template=template,
    )
    return exported.to(model.device).eval(), processor


def save_llava(model: Any, processor: Any, folder: Path) -> None:
    """Write a model and processor of :func:`as_llava`.

    The head of a Phi gets a bias of zeros in the file: vLLM's Phi requires it, transformers' LLaVA ignores it.

    Args:
        model: ``LlavaForConditionalGeneration``.
        processor: Its processor.
        folder: Target folder.
    """
    head, model.config.text_config._name_or_path = model.lm_head, ""
    if model.config.text_config.architectures == ["PhiForCausalLM"] and head.bias is None:
        head.bias = nn.Parameter(torch.zeros_like(head.weight[:, 0]), requires_grad=False)
    model.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        weights = {_published(name): tensor for name, tensor in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {_published(name): shard for name, shard in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=2) + "\n")
    processor.save_pretrained(folder)


def _published(name: str) -> str:
    """Name of a weight in the published LLaVA models, which every version of transformers and vLLM reads."""
    own, inner = "vision_tower.", "vision_model."
    rest = name.removeprefix(own)
    return own + inner + rest if rest != name and not rest.startswith(inner) else name


def _head(language: LanguageModel, token: int) -> nn.Linear:
    """Output head without bias and with a row for the image token, which the embeddings get, too."""
    model = language.model
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ModelError(f"the head of the language model is a {type(head).__name__}, LLaVA's a plain layer", UNFIT)
    if head.bias is not None:
        base = getattr(model, model.base_model_prefix)
        norms = [module for name, module in base.named_children() if "norm" in name]
        if len(norms) != 1:
            raise ModelError("the head of the language model has a bias, LLaVA's has none", UNFIT)
        head = fold_head_bias(norms[0], head)
        model.config.tie_word_embeddings = False
        model.set_output_embeddings(head)
    rows = head.weight.shape[0]
    if token < rows:
        return head
    embeddings = model.get_input_embeddings()
    for layer in {id(each): each for each in (embeddings, head)}.values():
        if layer.weight.shape[0] == rows:
            layer.weight = nn.Parameter(_with_row(layer.weight, token + 1), requires_grad=False)
    if model.config.tie_word_embeddings:
        head.weight = embeddings.weight
    embeddings.num_embeddings = head.out_features = token + 1
    return head


def _with_row(weight: Tensor, rows: int) -> Tensor:
    return torch.cat([weight, weight.new_zeros(rows - weight.shape[0], weight.shape[1])])
