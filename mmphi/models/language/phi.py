"""Phi models by size, and what one token costs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PhiConfig

PHI2_VOCABULARY = 51200  # Rows of Phi-2's embedding; its tokenizer uses 50,295 of them.


@dataclass(frozen=True)
class PhiSize:
    """A shape of Phi.

    Attributes:
        layers: Transformer layers.
        width: Hidden width.
        heads: Attention heads.
        tied: Whether the output head shares the embedding's weights, as small models do: with Phi-2's 51,200 rows they
            would be all head otherwise.
        like: The published model of this shape.
    """

    layers: int
    width: int
    heads: int
    tied: bool
    like: str = ""


SIZES = {
    "1M": PhiSize(4, 128, 4, True),
    "10M": PhiSize(6, 160, 5, True),
    "30M": PhiSize(6, 384, 6, True),
    "124M": PhiSize(12, 768, 12, True, "GPT-2 small"),
    "350M": PhiSize(20, 1024, 16, False, "phi-1-small"),
    "1.3B": PhiSize(24, 2048, 32, False, "Phi-1.5"),
    "phi-2": PhiSize(32, 2560, 32, False, "Phi-2"),
}
"""By name; parameters are counted with their 51,200 rows, but for 1M, which is meant for a vocabulary of 2,048."""


def phi_config(
    layers: int,
    width: int,
    heads: int,
    context: int,
    vocabulary: int,
    end: int | None,
    *,
    tied: bool = False,
    rotary: float = 0.0,
) -> PhiConfig:
    """A Phi of any size: Phi-2's shape, scaled.

    Args:
        layers: Transformer layers.
        width: Hidden width.
        heads: Attention heads.
        context: Longest context, in tokens.
        vocabulary: Rows of the embedding.
        end: Id of the end of text, which is also Phi-2's beginning.
        tied: Whether the output head shares the embedding's weights.
        rotary: Share of each head's channels that positions rotate; 0 is Phi's own.
    """
    from transformers import PhiConfig  # Counting parameters needs none of it.

    return PhiConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
        # 32 of 80 in Phi-2; half of 64 in Phi-1 and 1.5.
        partial_rotary_factor=rotary or (0.4 if width // heads == 80 else 0.5),
        resid_pdrop=0.0,
        tie_word_embeddings=tied,
        bos_token_id=end,
        eos_token_id=end,
    )


@dataclass(frozen=True)
class Parameters:
    """How many parameters a Phi has.

    Attributes:
        embedding: Of the token embedding.
        inner: Of the layers and the last norm.
        head: Of the output head; where it is tied, its bias alone.
    """

    embedding: int
    inner: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.inner + self.head

    def __str__(self) -> str:
        parts = f"{self.inner:,} in the layers, {self.embedding:,} in the embedding, {self.head:,} in the head"
        return f"{self.total:,} parameters ({parts})"


def parameters_of(shape: PhiSize, vocabulary: int = PHI2_VOCABULARY) -> Parameters:
    """Parameters of a Phi of some shape."""
    width, ffn = shape.width, 4 * shape.width
    attention = 4 * (width * width + width)
    feed_forward = 2 * width * ffn + ffn + width
    inner = shape.layers * (attention + feed_forward + 2 * width) + 2 * width
    head = vocabulary if shape.tied else vocabulary * width + vocabulary
    return Parameters(vocabulary * width, inner, head)


def count_parameters(config: Any) -> Parameters:
    """Parameters of a Phi that :func:`phi_config` made, from its configuration alone."""
    tied = bool(config.tie_word_embeddings)
    shape = PhiSize(config.num_hidden_layers, config.hidden_size, config.num_attention_heads, tied)
    return parameters_of(shape, config.vocab_size)


def training_flops(config: Any, tokens: int, pairs: int) -> float:
    """Floating-point operations of training on some tokens, forward and backward.

    Multiplications of weights count 6 a weight and token (Kaplan et al. 2020, section 2.1), the output head's among
    them, whether or not it is tied; looking an embedding up counts nothing. Attention counts only what is seen: of a
    pair of positions 4 a unit of width and layer forward, and twice that backward. Recomputing counts nothing.

    Args:
        config: Of the model.
        tokens: Positions that went through it.
        pairs: Pairs of a position and one that it sees, itself among them.
    """
    layers, width, ffn = int(config.num_hidden_layers), int(config.hidden_size), int(config.intermediate_size)
    matrices = layers * (4 * width * width + 2 * width * ffn)
    return 6.0 * (matrices + int(config.vocab_size) * width) * tokens + 12.0 * layers * width * pairs


def size_config(size: str, context: int = 2048, vocabulary: int = PHI2_VOCABULARY, end: int | None = None) -> PhiConfig:
    """The configuration of a named size; ``phi-2`` is that of microsoft/phi-2, dropout and all.

    Raises:
        KeyError: If there is none of that name.
    """
    shape = SIZES[size]
    config = phi_config(shape.layers, shape.width, shape.heads, context, vocabulary, end, tied=shape.tied)
    if size == "phi-2":
        config.resid_pdrop = 0.1
    return config
