"""Low-rank adapters (LoRA) on the frozen layers of a language model: add, save in PEFT's format, load and merge."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmphi.errors import ModelError
from mmphi.models.language.language_model import LanguageModel

ADAPTER = "adapter"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterConfig:
    """Shape of a LoRA adapter (Hu et al. 2021, arXiv 2106.09685).

    Attributes:
        rank: Rank of the update.
        alpha: Numerator of the scaling: ``alpha / rank``, or with ``rslora`` ``alpha / sqrt(rank)``.
        rslora: Whether to use rank-stabilised scaling (Kalajdzievski 2023, arXiv 2312.03732).
        dropout: Dropout rate of the adapter's inputs.
        dora: Whether to train magnitudes separately from directions (Liu et al. 2024, arXiv 2402.09353).
        targets: Names of the adapted layers; empty for all linear ones.
        seed: Random seed of the initial weights.
    """

    rank: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0
    dora: bool = False
    targets: tuple[str, ...] = ()
    seed: int = 0


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """Linear layers of a language model by full name, quantised or not, except the output head."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    head = model.get_output_embeddings()
    kinds = (nn.Linear, Linear4bit, Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds) and module is not head}


def targets_of(model: Any, wanted: tuple[str, ...] = ()) -> list[str]:
    """Names of the layers that get an adapter, for PEFT's ``target_modules``.

    Args:
        model: The language model.
        wanted: Last components of names, such as ``q_proj``; empty for all linear layers.

    Raises:
        ModelError: If no linear layer has one of the names, or the model has no linear layer.
    """
    there = sorted({name.rpartition(".")[2] for name in linear_layers(model)})
    unknown = [name for name in wanted if name not in there]
    if unknown or not there:
        raise ModelError(
            f"{type(model).__name__} has no linear layer {unknown[0]!r}" if unknown else "there is no linear layer",
            f"it has {', '.join(there)}" if there else "an adapter needs linear layers",
        )
    return list(wanted) or there


def add_adapter(language: LanguageModel, shape: AdapterConfig) -> LanguageModel:
    """Language model with a new adapter, which does not change its outputs until it is trained.

    The layers of ``language.model`` are wrapped in place, so it must not be shared.

    Raises:
        ModelError: If no layer matches, or the rank is above the smallest width of a layer.
    """
    from peft import LoraConfig, get_peft_model

    names = targets_of(language.model, shape.targets)
    layers = {n: m for n, m in linear_layers(language.model).items() if n.rpartition(".")[2] in names}
    narrow = min(layers, key=lambda name: _narrow(layers[name]))
    if shape.rank > _narrow(layers[narrow]):
        raise ModelError(
            f"rank {shape.rank} is above the width of {narrow}, which is {_narrow(layers[narrow])}",
            f"use a rank of at most {_narrow(layers[narrow])}",
        )
    torch.manual_seed(shape.seed)
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,  # type: ignore[arg-type]  # Annotated as int, used as a float factor.
        lora_dropout=shape.dropout,
        use_rslora=shape.rslora,
        use_dora=shape.dora,
        target_modules=names,
        task_type="CAUSAL_LM",
        base_model_name_or_path=language.name,
    )
    return replace(language, adapter=get_peft_model(language.model, config))


def _narrow(layer: Any) -> int:
    return min(int(layer.in_features), int(layer.out_features))


def save_adapter(language: LanguageModel, folder: Path) -> None:
    """Write an adapter for PEFT's ``from_pretrained``."""
    language.adapter.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty template; the model has its own card.


def load_adapter(language: LanguageModel, folder: Path) -> LanguageModel:
    """Language model with an adapter from a folder; its layers are wrapped in place.

    Raises:
        ModelError: If the adapter cannot be read, has non-finite weights, or does not fit the model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        finite = all(bool(torch.isfinite(t).all()) for t in load_file(folder / WEIGHTS).values())
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"the adapter in {folder} cannot be read: {error}", "use a folder that PEFT or `mmphi qlora` wrote"
        ) from error
    if not finite:
        raise ModelError(f"the adapter in {folder} is not finite", "train it again with a lower learning rate")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # PEFT only warns about weights without a matching layer.
            adapter = PeftModel.from_pretrained(language.model, str(folder))
    except (RuntimeError, ValueError, UserWarning) as error:
        what = str(error).strip().splitlines()[0]
        raise ModelError(
            f"the adapter in {folder} does not fit {language.name}: {what[:200]}",
            "load it on the model it was made for",
        ) from error
    adapter.eval().requires_grad_(False)
    return replace(language, adapter=adapter)


def adapter_digest(folder: Path) -> str:
    """SHA-256 of the adapter's configuration and weights."""
    digest = hashlib.sha256()
    for name in ("adapter_config.json", WEIGHTS):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def adapter_parameters(language: LanguageModel) -> dict[str, nn.Parameter]:
    """Parameters of the adapter, by name in ``language.model``."""
    return {name: p for name, p in language.model.named_parameters() if "lora_" in name}


@torch.no_grad()
def merge_adapter(language: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """Language model of plain layers, with the adapter merged and quantised layers dequantised.

    An adapter trained on a quantised base is merged into the dequantised values of that base (transformers #31293).

    Args:
        language: Language model with or without an adapter, quantised or not; its layers are changed in place.
        dtype: Type of the merged weights; sums are computed in fp32.

    Raises:
        ModelError: If a quantised layer cannot be dequantised, or the adapter is neither LoRA nor DoRA.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from peft.tuners.lora import LoraLayer

    model = language.model
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            base = child.get_base_layer() if isinstance(child, LoraLayer) else child
            if not isinstance(base, (nn.Linear, Linear4bit, Linear8bitLt)):
                continue
            if base is child and not isinstance(base, (Linear4bit, Linear8bitLt)):
                continue
            plain = nn.Linear(base.in_features, base.out_features, base.bias is not None, dtype=torch.float32)
            plain.to(base.weight.device)
            plain.weight.copy_(_weight(base))
            if base.bias is not None:
                plain.bias.copy_(base.bias)
            if isinstance(child, LoraLayer):
                _add(plain, child)
            setattr(module, name, plain)
    for stale in ("hf_quantizer", "quantization_method"):
        if hasattr(model, stale):
            delattr(model, stale)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
    model.to(dtype).requires_grad_(False).eval()
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    return replace(language, adapter=None, settings=language.settings.model_copy(update={"precision": precision}))


def _weight(layer: Any) -> torch.Tensor:
    from peft.utils.integrations import dequantize_bnb_weight

    if isinstance(layer, nn.Linear) and layer.weight.is_floating_point():
        return layer.weight.float()
    try:
        return dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).float()
    except (RuntimeError, ValueError, AttributeError, NotImplementedError) as error:
        raise ModelError(
            f"a quantised layer cannot be dequantised: {error}", "merge on a device that bitsandbytes supports"
        ) from error


def _add(plain: nn.Linear, layer: Any) -> None:
    """Add an adapter's update to the weights of a plain layer.

    Raises:
        ModelError: If the adapter is neither LoRA nor DoRA.
    """
    for name in layer.active_adapters:
        plain.weight += layer.get_delta_weight(name).float()
        if name in layer.lora_magnitude_vector:  # DoRA: rows of the sum are rescaled to learned lengths (equation 5).
            lengths = layer.lora_magnitude_vector[name].weight.float()
            plain.weight *= (lengths / plain.weight.norm(dim=1))[:, None]
        elif name in layer.lora_variant:
            kind = type(layer.lora_variant[name]).__name__
            raise ModelError(f"an adapter of the kind {kind} cannot be merged", "merge LoRA or DoRA")
