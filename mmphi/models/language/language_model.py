"""Frozen causal language models: by hub name, from a folder, or with random weights from a configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mmphi.config.shared import LanguageSettings
from mmphi.data.content_hash import Digests
from mmphi.data.hf_connectivity import hub_is_reachable
from mmphi.errors import ModelError
from mmphi.models.language.packing_check import packing_error, shortest_window
from mmphi.models.loading_bar import no_loading_bar
from mmphi.models.patches.dequantized_linear import dequantize_layers_once
from mmphi.models.patches.module_patches import apply_patches
from mmphi.text.packing import Layout
from mmphi.text.prompt import Prompt
from mmphi.text.tokenizer import phi2_tokenizer

PRETRAIN = "pretrain"
PACKED_TOLERANCE, PACKED_TOLERANCE_ROUNDED = 1e-3, 0.1  # Relative; the second for bf16 and quantised models.
EMBEDDED_AT_ONCE = 8192  # Tokens per call; an fp32 copy of a whole large table would take twice its memory.
LONG = 96  # Tokens per sequence from which, on a CPU, variable-length attention is faster than a mask over rows.
STYLE_FILE = "mmphi_prompt.json"  # Prompt style, next to the weights of a model trained here.
IN_MEMORY = "in memory"  # Placeholder digest of a model passed as an object; saving replaces it.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LanguageModel:
    """Frozen language model with its tokenizer and prompt.

    Attributes:
        model: A Hugging Face causal LM, in eval mode, without gradients.
        tokenizer: Its tokenizer.
        prompt: Prompt writer for conversations.
        width: Width of the embeddings.
        name: Hub name, folder or configuration file that it was loaded from.
        digest: Digest of the weights: a folder's content, or a hub name with its revision.
        settings: Settings that it was loaded with.
        adapter: PEFT's model around ``model``, if its layers have an adapter.
    """

    model: Any
    tokenizer: Any
    prompt: Prompt
    width: int
    name: str
    digest: str
    settings: LanguageSettings
    adapter: Any = None

    @property
    def ends(self) -> list[int]:
        """IDs of the tokens that end an answer: the prompt's, the generation config's and the tokenizer's."""
        own = getattr(self.model.generation_config, "eos_token_id", None)
        own = own if isinstance(own, list) else [] if own is None else [own]
        return list(dict.fromkeys([self.prompt.end[-1], *own, self.tokenizer.eos_token_id]))

    @torch.no_grad()
    def embeddings(self, ids: Sequence[int] | None = None) -> torch.Tensor:
        """Input embeddings of tokens, (len(ids), width), float32; of all tokens by default.

        They are outputs of the embedding module: Gemma's module scales its table by the square root of the width.
        """
        module = self.model.get_input_embeddings()
        place = module.weight.device
        wanted = torch.arange(module.num_embeddings) if ids is None else torch.tensor(list(ids), dtype=torch.long)
        rows = [module(part.to(place)).float() for part in torch.split(wanted, EMBEDDED_AT_ONCE)]
        return torch.cat(rows) if rows else torch.zeros(0, self.width, device=place)

    @cached_property
    def packing_error(self) -> float:
        """Packing error of masked rows, computed once."""
        return packing_error(self.model)

    @cached_property
    def line_error(self) -> float:
        """Packing error of one row with variable-length attention, computed once; infinite without SDPA."""
        if self.model.config._attn_implementation != "sdpa":  # Variable-length attention replaces SDPA only.
            return math.inf
        return packing_error(self.model, Layout("line"))

    def layout(self, max_length: int, in_line: bool | None = None) -> Layout:
        """Fastest packing layout that gives this model the right logits.

        Args:
            max_length: Tokens of the longest sequence.
            in_line: Whether to prefer one row with variable-length attention; default on a GPU, and on a CPU for long
                sequences. A CPU computes it one sequence after the other, slower for short ones than masked rows.
        """
        if not self.packs(max_length):
            return Layout("alone", self.width)
        long = 0 if in_line or self.model.device.type == "cuda" else LONG
        wanted = max_length >= long if in_line is None else in_line
        return (
            Layout("line", self.width, long)
            if wanted and self.line_error < self.tolerance
            else Layout("rows", self.width)
        )

    @property
    def tolerance(self) -> float:
        """Largest difference of logits, divided by their standard deviation, that is attributed to rounding."""
        return PACKED_TOLERANCE if self.settings.precision == "fp32" else PACKED_TOLERANCE_ROUNDED

    def packs(self, max_length: int) -> bool:
        """Whether sequences of up to ``max_length`` tokens may share rows."""
        window = shortest_window(self.model.config)
        return self.packing_error < self.tolerance and not 0 < window < max_length

    @property
    def local(self) -> Path | None:
        """Folder of the model; ``None`` if it is not on this machine."""
        return Path(self.name) if Path(self.name).is_dir() else None


def _quantization(precision: str, device: torch.device) -> Any:
    from transformers import BitsAndBytesConfig

    if precision == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    # On a CPU without AVX-512 NF4 is about four times faster with fp32 arithmetic than with bf16.
    compute = torch.float32 if device.type == "cpu" else torch.bfloat16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def disable_bnb_repacking(model: Any) -> Any:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU with AVX-512, and return the model.

    bitsandbytes 0.50 repacks at the first forward pass without gradients: in another precision, only for widths that 64
    divides, and for a kernel that silently gives no gradients to trained modules before the layer.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def save_language_model(model: Any, prompt: Prompt, folder: Path) -> None:
    """Write a model in Hugging Face's format, with its tokenizer and prompt style."""
    # PEFT moves the weights of adapted layers below `base_layer`; the adapter is saved separately.
    own = {name.replace(".base_layer", ""): t for name, t in model.state_dict().items() if "lora_" not in name}
    model.save_pretrained(folder, state_dict=own)
    prompt.tokenizer.save_pretrained(folder)
    (folder / STYLE_FILE).write_text(json.dumps({"style": prompt.style}) + "\n")


def language_model_path(settings: LanguageSettings, pretrained: Path | None) -> str:
    """Hub name, folder or configuration file of the model in the settings.

    Raises:
        ModelError: If the settings name the pretrained model, and there is none.
    """
    if settings.model != PRETRAIN:
        return settings.model
    if pretrained is None:
        raise ModelError("language.model = pretrain, but there is no pretrained model", "run `mmphi pretrain`")
    return str(pretrained / "language")


def language_model_digest(name: str, revision: str) -> str:
    """Identifier of a model: the digest of a folder or file, or a hub name with its revision."""
    path = Path(name)
    return f"sha256:{Digests().of(path)}" if path.exists() else f"{name}@{revision or 'newest'}"


def load_language_model(settings: LanguageSettings, pretrained: Path | None, device: torch.device) -> LanguageModel:
    """Load a model and freeze it.

    Args:
        settings: The ``language`` section.
        pretrained: Folder of the ``pretrain`` stage, if ``language.model`` names it.
        device: Device of the model.

    Raises:
        ModelError: If the model or its tokenizer cannot be loaded, or its weights are not finite.
    """
    name = language_model_path(settings, pretrained)
    config_only = name.endswith(".json")
    tokenizer = tokenizer_of(settings, name)
    dtype = DTYPES.get(settings.precision, torch.float32 if device.type == "cpu" else torch.bfloat16)
    model = _random(name, settings.precision, dtype, device) if config_only else _load(name, settings, dtype, device)
    dequantize_layers_once(apply_patches(model)).requires_grad_(False).eval()
    _check_finite(model, name)
    embedding = model.get_input_embeddings()
    _check_vocabulary(tokenizer, embedding, name)
    prompt = Prompt(tokenizer, _style(settings, Path(name)))
    digest = language_model_digest(name, settings.revision)
    return LanguageModel(model, tokenizer, prompt, embedding.embedding_dim, name, digest, settings)


def wrap_language_model(model: Any, tokenizer: Any, prompt: str = "auto") -> LanguageModel:
    """Language model from loaded objects; the model is frozen in place.

    Args:
        model: A causal LM of transformers.
        tokenizer: Its tokenizer.
        prompt: Prompt style: ``plain``, ``phi``, ``chat``, or ``auto``.

    Raises:
        ModelError: If the tokenizer has more tokens than the model has embeddings, or does not support the prompt
            style.
    """
    embedding = model.requires_grad_(False).eval().get_input_embeddings()
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    _check_vocabulary(tokenizer, embedding, name)
    precision = "fp32" if embedding.weight.dtype == torch.float32 else "bf16"
    settings = LanguageSettings.model_validate({"model": name, "prompt": prompt, "precision": precision})
    style: Any = prompt
    return LanguageModel(
        model, tokenizer, Prompt(tokenizer, style), embedding.weight.shape[1], name, IN_MEMORY, settings
    )


def _check_vocabulary(tokenizer: Any, embedding: Any, name: str) -> None:
    if len(tokenizer) > embedding.num_embeddings:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, {name} only {embedding.num_embeddings} embeddings",
            "set language.tokenizer to the tokenizer that the model was trained with",
        )


def _style(settings: LanguageSettings, folder: Path) -> Any:
    """Prompt style of the settings; ``auto`` takes the style that a model trained here was saved with."""
    if settings.prompt == "auto" and (folder / STYLE_FILE).is_file():
        return json.loads((folder / STYLE_FILE).read_text())["style"]
    return settings.prompt


def tokenizer_of(settings: LanguageSettings, name: str) -> Any:
    """Tokenizer of the settings, by default the model's own.

    Args:
        settings: The ``language`` section.
        name: Hub name, folder or configuration file of the model.

    Raises:
        ModelError: If the tokenizer cannot be loaded.
    """
    own = str(Path(name).parent) if name.endswith(".json") else name
    return _tokenizer(settings.tokenizer or own, settings.revision)


def _tokenizer(name: str, revision: str) -> Any:
    if name == "phi-2":
        return phi2_tokenizer()
    if not Path(name).exists():
        hub_is_reachable()  # If not, sets offline mode: transformers would retry for most of a minute.
    try:
        return AutoTokenizer.from_pretrained(name, **_pinned(name, revision))
    except (OSError, ValueError) as error:
        raise _missing("tokenizer", name, error) from error


def _pinned(name: str, revision: str) -> dict[str, str]:
    return {"revision": revision} if revision and not Path(name).exists() else {}


def _load(name: str, settings: LanguageSettings, dtype: torch.dtype, device: torch.device) -> Any:
    quantized = settings.precision in ("4bit", "8bit")
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "device_map": {"": device}}
    options |= _pinned(name, settings.revision)
    if quantized:
        options["quantization_config"] = _quantization(settings.precision, device)
    try:
        with no_loading_bar(name):
            return disable_bnb_repacking(AutoModelForCausalLM.from_pretrained(name, **options))
    except (OSError, ValueError) as error:
        raise _missing("model", name, error) from error


def _missing(what: str, name: str, error: Exception) -> ModelError:
    if Path(name).exists():
        return ModelError(f"the {what} in {name} cannot be loaded: {_first_line(error)}", "check the folder's files")
    return ModelError(
        f"language.{what} = {name}: no such folder, and it cannot be downloaded from the hub: {_first_line(error)}",
        "check the name; without network, give the path of a folder with its configuration and weights",
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _random(path: str, precision: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Model with random weights from a configuration, for measuring speed and memory."""
    try:
        config = AutoConfig.for_model(**json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{path} is not a model configuration: {_first_line(error)}", "give a config.json") from error
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if precision in ("4bit", "8bit"):
        model = disable_bnb_repacking(_quantize(model, precision, device))
    return model


def _quantize(model: Any, precision: str, device: torch.device) -> Any:
    """Quantise every linear layer except the head, in place."""
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
            raise ModelError(f"{name}: the weights {key} are not finite", "fetch or train the model again")
