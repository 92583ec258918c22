"""Causal language models: by hub name, from a folder, or from a configuration with random weights; always frozen."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PhiConfig

from mmphi.errors import ModelError
from mmphi.models.prompt import Prompt
from mmphi.models.tokenizer import phi2_tokenizer
from mmphi.settings import LanguageSettings, PretrainSettings

PRETRAIN = "pretrain"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Language:
    """A frozen language model and how to speak to it.

    Attributes:
        model: A Hugging Face causal LM, in eval mode, without gradients.
        tokenizer: Its tokenizer.
        prompt: Writes conversations.
        width: Width of its embeddings.
        name: Where it came from.
    """

    model: Any
    tokenizer: Any
    prompt: Prompt
    width: int
    name: str


def phi_config(chosen: PretrainSettings, vocabulary: int, end: int) -> PhiConfig:
    """A Phi of any size: Phi-2's shape, scaled.

    Args:
        chosen: Layers, width, heads and context.
        vocabulary: Rows of the embedding.
        end: Id of the end of text, which is also Phi-2's beginning.
    """
    return PhiConfig(
        vocab_size=vocabulary,
        hidden_size=chosen.width,
        intermediate_size=4 * chosen.width,
        num_hidden_layers=chosen.layers,
        num_attention_heads=chosen.heads,
        max_position_embeddings=chosen.context,
        partial_rotary_factor=0.5 if chosen.width // chosen.heads < 64 else 0.4,
        resid_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
    )


def _quantization(precision: str, device: torch.device) -> Any:
    from transformers import BitsAndBytesConfig

    if precision == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    # On a CPU without AVX-512 NF4 is about four times faster with fp32 arithmetic than with bf16.
    compute = torch.float32 if device.type == "cpu" else torch.bfloat16
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def load_language(settings: LanguageSettings, pretrained: Path | None, device: torch.device) -> Language:
    """Load a model and freeze it.

    Args:
        settings: The ``language`` section.
        pretrained: Folder of the ``pretrain`` stage, where ``language.model`` names it.
        device: Where the model goes.

    Raises:
        ModelError: If it cannot be had, or its weights are not finite.
    """
    name = settings.model
    if name == PRETRAIN:
        if pretrained is None:
            raise ModelError("language.model = pretrain, but nothing was pretrained", "run `mmphi pretrain`")
        name = str(pretrained / "model")
    config_only = name.endswith(".json")
    tokenizer = _tokenizer(settings.tokenizer or (str(Path(name).parent) if config_only else name))
    dtype = DTYPES.get(settings.precision, torch.float32 if device.type == "cpu" else torch.bfloat16)
    model = _random(name, settings.precision, dtype, device) if config_only else _load(name, settings, dtype, device)
    model.requires_grad_(False).eval()
    _check_finite(model, name)
    embedding = model.get_input_embeddings()
    if len(tokenizer) > embedding.num_embeddings:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, {name} only {embedding.num_embeddings} embeddings",
            "give language.tokenizer the one that the model was trained with",
        )
    return Language(model, tokenizer, Prompt(tokenizer, settings.prompt), embedding.embedding_dim, name)


def _tokenizer(name: str) -> Any:
    if name == "phi-2":
        return phi2_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _missing("tokenizer", name, error) from error


def _load(name: str, settings: LanguageSettings, dtype: torch.dtype, device: torch.device) -> Any:
    quantized = settings.precision in ("4bit", "8bit")
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "device_map": {"": device}}
    if quantized:
        options["quantization_config"] = _quantization(settings.precision, device)
    try:
        return AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise _missing("model", name, error) from error


def _missing(what: str, name: str, error: Exception) -> ModelError:
    if Path(name).exists():
        return ModelError(f"the {what} in {name} cannot be loaded: {_first_line(error)}", "check the folder's files")
    return ModelError(
        f"language.{what} = {name}: no such folder, and the hub did not give it: {_first_line(error)}",
        "check the name; with no hub in reach give the path of a folder with its configuration and weights",
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _random(path: str, precision: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of a configuration's shape with random weights: for measuring speed and memory."""
    try:
        config = AutoConfig.for_model(**json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{path} is no configuration of a model: {_first_line(error)}", "give a config.json"
        ) from error
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if precision in ("4bit", "8bit"):
        model = _quantize(model, precision, device)
    return model


def _quantize(model: Any, precision: str, device: torch.device) -> Any:
    """Replace every linear layer but the head by a quantised one with the same weights."""
    from bitsandbytes.nn import modules as bnb

    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, linear in list(module.named_children()):
            if not isinstance(linear, torch.nn.Linear) or linear is head:
                continue
            shape = linear.in_features, linear.out_features, linear.bias is not None
            if precision == "8bit":
                small: Any = bnb.Linear8bitLt(*shape, has_fp16_weights=False)
                small.weight = bnb.Int8Params(linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
            else:
                compute = torch.float32 if device.type == "cpu" else torch.bfloat16
                small = bnb.Linear4bit(*shape, compute_dtype=compute, quant_type="nf4")
                small.weight = bnb.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            small.bias = linear.bias
            setattr(module, name, small.to(device))
    return model


def _check_finite(model: Any, name: str) -> None:
    for key, tensor in model.named_parameters():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(f"{name}: the weights {key} are not finite", "fetch or train the model anew")


def weights_digest(folder: Path) -> str:
    """SHA-256 over a folder's safetensors files, in order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
