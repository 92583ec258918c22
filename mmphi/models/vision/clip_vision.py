"""Conversion of open_clip's vision encoders to transformers: ``CLIPVisionModel`` and its image processor."""

from __future__ import annotations

from typing import Any

from open_clip.transform import PreprocessCfg
from torch import Tensor, nn

from mmphi.errors import ModelError

UNFIT = "use one of open_clip's own ViTs (ViT-B-32, ViT-L-14-336, or a light CLIP with from_nothing=vit)"
RESAMPLE = {"bicubic": 3, "bilinear": 2}  # PIL's numbers.
NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
}
INNER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"} | {
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def clip_vision(visual: Any) -> Any:
    """``CLIPVisionModel`` with the weights of an open_clip ViT, in fp32.

    Args:
        visual: open_clip's vision encoder.

    Raises:
        ModelError: If it is not a ViT that CLIPVisionModel can represent.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    if type(visual).__name__ != "VisionTransformer" or not hasattr(visual, "conv1"):
        inner = type(getattr(visual, "trunk", visual)).__name__
        raise ModelError(f"the vision encoder is a {inner}, and LLaVA's is a CLIP ViT", UNFIT)
    block, weights = visual.transformer.resblocks[0], visual.state_dict()
    heights, widths = visual.image_size, visual.patch_size
    if heights[0] != heights[1] or widths[0] != widths[1]:
        raise ModelError(
            f"the vision encoder has inputs of {heights} pixels and patches of {widths}, LLaVA needs squares", UNFIT
        )
    config = CLIPVisionConfig(
        hidden_size=block.ln_1.normalized_shape[0],
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(visual.transformer.resblocks),
        num_attention_heads=block.attn.num_heads,
        image_size=heights[0],
        patch_size=widths[0],
        hidden_act=_activation(block.mlp.gelu),
        layer_norm_eps=block.ln_1.eps,
        projection_dim=visual.output_dim,
    )
    # Before transformers 5.2x the encoder was in a submodule.
    model = CLIPVisionModel(config).float().eval().requires_grad_(False)
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in model.state_dict()) else ""
    renamed = {prefix + name: tensor for name, tensor in _renamed(weights).items()}
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.endswith("position_ids")}
    if {name: tensor.shape for name, tensor in renamed.items()} != wanted:
        odd = sorted(renamed.keys() ^ wanted.keys()) or sorted(n for n in wanted if renamed[n].shape != wanted[n])
        raise ModelError(f"the vision encoder has weights that a CLIP ViT does not have: {odd[0]}", UNFIT)
    model.load_state_dict(renamed, strict=False)
    return model


def _activation(layer: nn.Module) -> str:
    name = type(layer).__name__
    if name == "QuickGELU":
        return "quick_gelu"
    if isinstance(layer, nn.GELU):
        return "gelu" if layer.approximate == "none" else "gelu_pytorch_tanh"
    raise ModelError(f"the vision encoder has the activation {name}, which CLIP does not support", UNFIT)


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        tensor = tensor.float()
        if name in ("proj", "attn_mask"):  # The projection to the shared space, which LLaVA does not use.
            continue
        if name.startswith("transformer.resblocks."):
            number, _, rest = name.removeprefix("transformer.resblocks.").partition(".")
            layer = f"encoder.layers.{number}."
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                    found[f"{layer}self_attn.{part}_proj.{kind}"] = piece.clone()
                continue
            module, _, kind = rest.rpartition(".")
            found[f"{layer}{INNER.get(module, module)}.{kind}"] = tensor
            continue
        module, _, kind = name.rpartition(".")
        found[NAMES.get(name) or f"{NAMES.get(module, module)}.{kind}"] = tensor
    return found


def image_processor(visual: Any) -> Any:
    """Image processor of transformers with the same preprocessing, computed with PIL like open_clip's.

    Args:
        visual: open_clip's vision encoder.

    Raises:
        ModelError: If CLIP's image processor cannot resize in the same way.
    """
    try:
        from transformers import CLIPImageProcessorPil as Processor
    except ImportError:  # transformers < 5.2x
        from transformers import CLIPImageProcessor as Processor

    config = PreprocessCfg(**visual.preprocess_cfg)
    side = config.size[0] if isinstance(config.size, tuple | list) else config.size
    if config.resize_mode not in ("shortest", "squash") or config.interpolation not in RESAMPLE:
        raise ModelError(
            f"images are resized by {config.resize_mode}, {config.interpolation}, which CLIP does not support", UNFIT
        )
    squash = config.resize_mode == "squash"
    return Processor(
        size={"height": side, "width": side} if squash else {"shortest_edge": side},
        crop_size={"height": side, "width": side},
        resample=RESAMPLE[config.interpolation],
        image_mean=list(config.mean),
        image_std=list(config.std),
    )
