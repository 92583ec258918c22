"""Phi models by size: configurations, parameter counts and training FLOPs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PhiConfig

PHI2_VOCABULARY = 51200  # Rows of Phi-2's embedding; its tokenizer uses 50,295 of them.


@dataclass(frozen=True)
class PhiSize:
    """Shape of a Phi model.

    Attributes:
        layers: Transformer layers.
        width: Hidden width.
        heads: Attention heads.
        tied: Whether the output head shares the embedding's weights, as in small models: 51,200 rows of their own would
            be most of their parameters.
    """

    layers: int
    width: int
    heads: int
    tied: bool


SIZES = {
    "1M": PhiSize(4, 128, 4, True),
    "10M": PhiSize(6, 160, 5, True),
    "30M": PhiSize(6, 384, 6, True),
    "124M": PhiSize(12, 768, 12, True),  # GPT-2 small
    "350M": PhiSize(20, 1024, 16, False),  # phi-1-small
    "1.3B": PhiSize(24, 2048, 32, False),  # Phi-1.5
    "phi-2": PhiSize(32, 2560, 32, False),
}
"""Shapes by name. Parameter counts include 51,200 embedding rows, except for 1M with a vocabulary of 2,048."""


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
    """Phi configuration of any size, scaled from Phi-2's shape.

    Args:
        layers: Transformer layers.
        width: Hidden width.
        heads: Attention heads.
        context: Longest context, in tokens.
        vocabulary: Rows of the embedding.
        end: Token ID of the end of text, which is also the beginning of text.
        tied: Whether the output head shares the embedding's weights.
        rotary: Share of each head's channels with rotary embeddings; 0 is Phi's default.
    """
    from transformers import PhiConfig  # Not needed for counting parameters.

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
    """Parameter counts of a Phi model.

    Attributes:
        embedding: Parameters of the token embedding.
        inner: Parameters of the layers and the last norm.
        head: Parameters of the output head; only its bias if it is tied.
    """

    embedding: int
    inner: int
    head: int

    @property
    def total(self) -> int:
        """Total number of parameters."""
        return self.embedding + self.inner + self.head

    def __str__(self) -> str:
        parts = f"{self.inner:,} in the layers, {self.embedding:,} in the embedding, {self.head:,} in the head"
        return f"{self.total:,} parameters ({parts})"


def parameters_of(shape: PhiSize, vocabulary: int = PHI2_VOCABULARY) -> Parameters:
    """Parameter counts of a Phi shape."""
    width, ffn = shape.width, 4 * shape.width
    attention = 4 * (width * width + width)
    feed_forward = 2 * width * ffn + ffn + width
    inner = shape.layers * (attention + feed_forward + 2 * width) + 2 * width
    head = vocabulary if shape.tied else vocabulary * width + vocabulary
    return Parameters(vocabulary * width, inner, head)


def count_parameters(config: Any) -> Parameters:
    """Parameter counts of a configuration from :func:`phi_config`."""
    tied = bool(config.tie_word_embeddings)
    shape = PhiSize(config.num_hidden_layers, config.hidden_size, config.num_attention_heads, tied)
    return parameters_of(shape, config.vocab_size)


def training_flops(config: Any, tokens: int, pairs: int) -> float:
    """Floating-point operations of training on some tokens, forward and backward.

    Each weight counts 6 per token (Kaplan et al. 2020, section 2.1), including the output head's, tied or not;
    embedding lookups count 0. Attention counts unmasked pairs of positions only: 4 per pair, unit of width and layer
    forward, and twice that backward. Recomputation counts 0.

    Args:
        config: Configuration of the model.
        tokens: Number of processed positions.
        pairs: Number of unmasked pairs of a query and a key position, including each position with itself.
    """
    layers, width, ffn = int(config.num_hidden_layers), int(config.hidden_size), int(config.intermediate_size)
    matrices = layers * (4 * width * width + 2 * width * ffn)
    return 6.0 * (matrices + int(config.vocab_size) * width) * tokens + 12.0 * layers * width * pairs


def size_config(size: str, context: int = 2048, vocabulary: int = PHI2_VOCABULARY, end: int | None = None) -> PhiConfig:
    """Configuration of a named size; ``phi-2`` is that of microsoft/phi-2, including dropout.

    Raises:
        KeyError: If there is no such size.
    """
    shape = SIZES[size]
    config = phi_config(shape.layers, shape.width, shape.heads, context, vocabulary, end, tied=shape.tied)
    if size == "phi-2":
        config.resid_pdrop = 0.1
    return config
