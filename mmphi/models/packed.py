"""What training runs: packed rows in, the summed loss of their supervised tokens out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mmphi.errors import ModelError
from mmphi.text.packing import Pack


def block_causal_mask(segments_RT: Tensor) -> Tensor:
    """Which positions each position sees: itself and those before it in its own sequence.

    Args:
        segments_RT: Sequence of each token in its row; -1 after the last.

    Returns:
        bool (R, 1, T, T). Positions after the last sequence see each other, so that no softmax is empty.
    """
    same = segments_RT[:, None, :, None] == segments_RT[:, None, None, :]
    return same.tril()


class PackedModel(nn.Module):
    """A causal language model that reads projected features where its rows have places for them.

    Logits are computed only where a token is predicted: the hidden states are gathered just before the output head, by
    a hook that lives as long as the forward pass, so that whatever the model does after its head (scaling, soft caps)
    still happens. The language model is borrowed: nothing of this stays on it.

    Args:
        language_model: A Hugging Face causal LM, frozen or not.
        alone: Whether rows hold one sequence each, under the model's own mask: see :func:`packing_error`.
        **projectors: From the features of each kind of span to its embeddings.
    """

    def __init__(self, language_model: Any, *, alone: bool = False, **projectors: nn.Module) -> None:
        super().__init__()
        self.language_model, self.alone = language_model, alone
        self.projectors: Any = nn.ModuleDict(projectors)
        self._recomputing: list[Any] = []
        if language_model.get_output_embeddings() is None:
            raise ModelError(f"{type(language_model).__name__} has no output head", "use a causal language model")

    @property
    def frozen(self) -> bool:
        """Whether the language model itself is not trained; an adapter on it may be."""
        parameters = self.language_model.named_parameters()
        return not any(p.requires_grad for name, p in parameters if "lora_" not in name)

    def train(self, mode: bool = True) -> Self:
        """Set training mode; a frozen language model never drops."""
        super().train(mode)
        if self.frozen:
            self.language_model.eval()
            for layer in self.language_model.modules():
                if hasattr(layer, "lora_dropout"):  # Of an adapter, which drops while it is trained.
                    layer.training = mode
                    layer.lora_dropout.train(mode)
            for layer in self._recomputing:
                layer.training = mode
        return self

    @contextmanager
    def recomputing(self, wanted: bool = True) -> Iterator[None]:
        """Trade time for memory: keep no activations inside the language model's layers, until the end.

        transformers' layers recompute only in training mode, in which a frozen model would drop. So of a frozen model
        the layers alone are put into training mode, and what they drop themselves is set to nothing meanwhile.
        """
        if not wanted:
            yield
            return
        model = self.language_model
        # transformers renamed the methods in 5.2x; non-reentrant recomputing needs no gradient at the input.
        begin = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        end = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
        begin({"use_reentrant": False})
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] if self.frozen else []
        rates = [(m, getattr(m, "dropout", None)) for m in layers]
        self._recomputing = layers
        try:
            for layer, rate in rates:
                if isinstance(rate, float):
                    layer.dropout = 0.0
            self.train(self.training)
            yield
        finally:
            for layer, rate in rates:
                layer.training = False
                if isinstance(rate, float):
                    layer.dropout = rate
            self._recomputing = []
            end()
            model.disable_input_require_grads()  # Some versions of transformers enable them with it.

    def embed(self, input_ids: Tensor, features: Any, places: Any) -> Tensor:
        """Embeddings (R, T, W) of tokens, with projected features (P, D) of each kind at its places (P,)."""
        embeddings: Tensor = self.language_model.get_input_embeddings()(input_ids)
        flat = embeddings.flatten(0, 1)
        for kind, projector in self.projectors.items():
            seen = features.get(kind)
            if seen is None or not len(seen):
                # Nothing to see in this pack; the projector still takes part, as DDP expects of every parameter.
                seen = torch.zeros(0, projector.config.input_width, device=flat.device)
            projected = projector(seen).to(flat.dtype)
            where = places[kind] if kind in places else torch.zeros(0, dtype=torch.long, device=flat.device)
            flat = flat.index_copy(0, where, projected)
        return flat.view_as(embeddings)

    def logits(self, pack: Pack) -> Tensor:
        """Logits (K, V) at the positions that predict a supervised token."""
        with _gathering(self.language_model.get_output_embeddings(), pack["keep"]):
            output = self.language_model(
                inputs_embeds=self.embed(pack["input_ids"], pack["features"], pack["places"]),
                use_cache=False,
                **self._walls(pack),
            )
        logits: Tensor = output.logits[0]
        return logits

    def _walls(self, pack: Pack) -> dict[str, Tensor]:
        """What keeps sequences apart: of one in a row, the model's own padding mask; else who sees whom."""
        if self.alone:
            return {"attention_mask": (pack["segments"] >= 0).long()}
        return {"attention_mask": self._mask(pack["segments"]), "position_ids": pack["position_ids"]}

    def _mask(self, segments_RT: Tensor) -> Tensor:
        mask = block_causal_mask(segments_RT)
        if self.language_model.config._attn_implementation != "eager":
            return mask
        dtype = self.language_model.get_input_embeddings().weight.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    def forward(self, **pack: Any) -> Tensor:
        """Summed loss of the supervised tokens of a :class:`~mmphi.text.packing.Pack`, in nats, shape ()."""
        rows: Pack = pack  # type: ignore[assignment]  # keyword arguments, so that DDP and the Trainer can pass them
        return F.cross_entropy(self.logits(rows).float(), rows["targets"], reduction="sum")


@contextmanager
def _gathering(head: nn.Module, keep: Tensor) -> Iterator[None]:
    """Let a head see only the positions (K,) of the flattened rows."""

    def gather(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_RTW, *rest = inputs
        return (hidden_RTW.flatten(0, 1)[keep][None], *rest)

    hook = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        hook.remove()


PROBE = (7, 11)  # Lengths of the sequences that packing is tried with.


@torch.no_grad()
def packing_error(language_model: Any) -> float:
    """How far logits of packed sequences are from those of the same sequences alone.

    Isolating neighbours by a mask is exact for plain attention. Recurrent and hybrid models carry state across it, and
    some do not take it at all; of these it is 1 or more.

    Returns:
        Largest difference over the standard deviation of the logits.
    """
    weight = language_model.get_input_embeddings().weight
    ids = torch.arange(sum(PROBE), device=weight.device) * 37 % max(2, weight.shape[0] - 1)
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate(PROBE)])[None].to(weight.device)
    positions = torch.cat([torch.arange(n) for n in PROBE])[None].to(weight.device)
    rows = Pack(
        input_ids=ids[None],
        position_ids=positions,
        segments=segments,
        features={},
        places={},
        keep=torch.arange(len(ids), device=weight.device),
        targets=ids,
        step_tokens=torch.tensor(1.0),
    )
    alone = [language_model(input_ids=part[None], use_cache=False).logits[0] for part in ids.split(PROBE)]
    expected = torch.cat(alone).float()
    try:
        packed = PackedModel(language_model).logits(rows).float()
    except (RuntimeError, ValueError, TypeError, IndexError):  # It wants a mask of another form.
        return float("inf")
    return float((packed - expected).abs().max() / expected.std().clamp_min(1e-9))


def shortest_window(config: Any) -> int:
    """Tokens that the narrowest layer of a model sees back; 0 where all see everything.

    Who sees whom in packed rows overrides these windows, so that longer sequences would be read with wider ones.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and not any("sliding" in kind for kind in kinds):
        return 0
    if getattr(config, "use_sliding_window", True) is False:
        return 0
    return int(getattr(config, "sliding_window", None) or 0)
