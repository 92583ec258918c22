"""A minimal Phi in plain torch, in the style of nanoGPT: baseline and reference of the pretraining benchmark."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Parallel attention and feed-forward layers after one norm, with fused query, key and value projections."""

    def __init__(self, width: int, heads: int, rotated: int) -> None:
        super().__init__()
        self.heads, self.rotated = heads, rotated
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTW: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The block's output with its residual connection, (B, T, W)."""
        batch, length, width = x_BTW.shape
        normed = self.norm(x_BTW)
        q, k, v = self.qkv(normed).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True)
        attended = self.out(attended.transpose(1, 2).reshape(batch, length, width))
        seen: Tensor = x_BTW + attended + self.down(F.gelu(self.up(normed), approximate="tanh"))
        return seen

    def _rotate(self, x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, kept = x_BHTD[..., : self.rotated], x_BHTD[..., self.rotated :]
        a, b = turned.chunk(2, dim=-1)
        return torch.cat([turned * cos + torch.cat([-b, a], dim=-1) * sin, kept], dim=-1)


class MinimalPhi(nn.Module):
    """Embedding, blocks, norm and head; returns the mean loss of the next tokens.

    Args:
        config: A ``PhiConfig`` without dropout.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        rotated = int(width // heads * config.rope_parameters["partial_rotary_factor"])
        self.embed = nn.Embedding(config.vocab_size, width)
        self.blocks = nn.ModuleList([Block(width, heads, rotated) for _ in range(config.num_hidden_layers)])
        self.norm, self.head = nn.LayerNorm(width, eps=1e-5), nn.Linear(width, config.vocab_size)
        angles = 10000.0 ** -(torch.arange(0, rotated, 2) / rotated)
        turns = torch.outer(torch.arange(config.max_position_embeddings), torch.cat([angles, angles]))
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", turns.cos(), persistent=False)
        self.register_buffer("sin", turns.sin(), persistent=False)

    def forward(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean loss in nats per token, shape ()."""
        x_BTW = self.embed(ids_BT)
        cos, sin = self.cos[: ids_BT.shape[1]], self.sin[: ids_BT.shape[1]]
        for block in self.blocks:
            x_BTW = block(x_BTW, cos, sin)
        return F.cross_entropy(self.head(self.norm(x_BTW)).flatten(0, 1).float(), targets_BT.flatten())

    @classmethod
    def from_hugging_face(cls, model: Any) -> Self:
        """Model with the weights of a ``PhiForCausalLM``."""
        made, state = cls(model.config), model.state_dict()
        own = {"embed.weight": state["model.embed_tokens.weight"]}
        for part in ("weight", "bias"):
            own[f"norm.{part}"] = state[f"model.final_layernorm.{part}"]
            own[f"head.{part}"] = state[f"lm_head.{part}"]
            for i in range(len(made.blocks)):
                there = f"model.layers.{i}"
                own[f"blocks.{i}.norm.{part}"] = state[f"{there}.input_layernorm.{part}"]
                joined = [state[f"{there}.self_attn.{name}_proj.{part}"] for name in "qkv"]
                own[f"blocks.{i}.qkv.{part}"] = torch.cat(joined)
                own[f"blocks.{i}.out.{part}"] = state[f"{there}.self_attn.dense.{part}"]
                own[f"blocks.{i}.up.{part}"] = state[f"{there}.mlp.fc1.{part}"]
                own[f"blocks.{i}.down.{part}"] = state[f"{there}.mlp.fc2.{part}"]
        made.load_state_dict(own)
        return made
