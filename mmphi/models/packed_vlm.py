"""What training runs: packed rows in, the summed loss of their supervised tokens out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mmphi.errors import ModelError
from mmphi.models.contrastive_margin import contrastive_margin_loss
from mmphi.models.language.linear_cross_entropy import linear_cross_entropy
from mmphi.models.patches.sparse_last_layer import WORTH, compute_at_positions, find_positionwise_modules
from mmphi.models.patches.varlen_attention import varlen_attention_applied
from mmphi.text.packing import ROWS, Layout, PackedBatch


def block_causal_mask(segments_RT: Tensor, branches_RT: Tensor | None = None) -> Tensor:
    """Which positions each position sees: itself and those before it in its own sequence.

    Args:
        segments_RT: Sequence of each token in its row; -1 after the last.
        branches_RT: Where sequences share their beginning: 0 there, and their numbers after it.

    Returns:
        bool (R, 1, T, T). Positions after the last sequence see each other, so that no softmax is empty.
    """
    same = segments_RT[:, None, :, None] == segments_RT[:, None, None, :]
    if branches_RT is not None:
        seen = branches_RT[:, None, None, :]
        same &= (seen == 0) | (seen == branches_RT[:, None, :, None])
    return same.tril()


class PackedVLM(nn.Module):
    """A causal language model that reads projected features where its rows have places for them.

    Logits are computed only where a token is predicted: the hidden states are gathered just before the output head, by
    a hook that lives as long as the forward pass, so that whatever the model does after its head (scaling, soft caps)
    still happens. The language model is borrowed: nothing of this stays on it.

    Args:
        language_model: A Hugging Face causal LM, frozen or not.
        layout: How the sequences of a pack lie, one a row under the model's own mask: see
            :func:`~mmphi.models.language.packing_check.packing_error`.
        **projectors: From the features of each kind of span to its embeddings.
    """

    def __init__(self, language_model: Any, *, layout: Layout = ROWS, **projectors: nn.Module) -> None:
        super().__init__()
        self.language_model, self.layout = language_model, layout
        self.projectors: Any = nn.ModuleDict(projectors)
        self._recomputing: list[Any] = []
        self._recomputes = False
        self.compiled: Sequence[tuple[nn.Module, Any]] = ()  # Layers, and what is called in their place in training.
        if language_model.get_output_embeddings() is None:
            raise ModelError(f"{type(language_model).__name__} has no output head", "use a causal language model")
        self._plain_head = has_plain_head(language_model)
        self._last_parts: list[nn.Module] | None = None  # Not looked for yet.

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
        self._recomputing, self._recomputes = layers, True
        try:
            for layer, rate in rates:
                if isinstance(rate, float):
                    layer.dropout = 0.0
            self.train(self.training)
            # The backward pass attends again.
            with varlen_attention_applied(self.language_model) if self.layout.kind == "line" else nullcontext():
                yield
        finally:
            for layer, rate in rates:
                layer.training = False
                if isinstance(rate, float):
                    layer.dropout = rate
            self._recomputing, self._recomputes = [], False
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

    def logits(self, pack: PackedBatch) -> Tensor:
        """Logits (K, V) at the positions that predict a supervised token."""
        with self._last_layer(pack), _gathering(self.language_model.get_output_embeddings(), pack["keep"]):
            return self._run(pack)

    def _run(self, pack: PackedBatch) -> Tensor:
        with self._walled(pack), _called(self.compiled if self.training else ()):
            output = self.language_model(
                inputs_embeds=self.embed(pack["input_ids"], pack["features"], pack["places"]),
                use_cache=False,
                **self._walls(pack),
            )
        logits: Tensor = output.logits[0]
        return logits

    def _hidden(self, pack: PackedBatch) -> Tensor:
        """What the head is given (K, W) at the positions that predict a supervised token; the head itself rests."""
        head = self.language_model.get_output_embeddings()
        with self._last_layer(pack), _gathering(head, pack["keep"], resting=True) as seen:
            self._run(pack)
        return seen[0]

    def _last_layer(self, pack: PackedBatch) -> AbstractContextManager[None]:
        """The last layer rests where nothing is predicted, if that saves something.

        Not where it is compiled, for a certain number of positions, nor where the backward pass computes it again.
        """
        keep = pack["keep"]
        if len(keep) > WORTH * pack["input_ids"].numel() or self._recomputes or (self.training and self.compiled):
            return nullcontext()
        if self._last_parts is None:
            self._last_parts = find_positionwise_modules(self.language_model)
        # Answers that share what stands before them begin at the same place.
        return compute_at_positions(self._last_parts, torch.unique(keep) if "branches" in pack else keep)

    def _in_line(self, pack: PackedBatch) -> bool:
        """Whether a pack is a line; the model takes rows as well."""
        return self.layout.kind == "line" and "borders" in pack

    def _walled(self, pack: PackedBatch) -> AbstractContextManager[None]:
        return varlen_attention_applied(self.language_model) if self._in_line(pack) else nullcontext()

    def _walls(self, pack: PackedBatch) -> dict[str, Any]:
        """What keeps sequences apart: of one in a row, the model's own padding mask; borders; else who sees whom."""
        if self.layout.kind == "alone":
            return {"attention_mask": (pack["segments"] >= 0).long()}
        if self._in_line(pack):
            # Four dimensions: taken as it is, so that no mask over the whole row is built.
            none = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=pack["borders"].device)
            apart = {"borders": pack["borders"], "longest": pack["longest"]}
            return {"attention_mask": none, "position_ids": pack["position_ids"], **apart}
        return {"attention_mask": self._mask(pack), "position_ids": pack["position_ids"]}

    def _mask(self, pack: PackedBatch) -> Tensor:
        mask = block_causal_mask(pack["segments"], pack.get("branches"))
        if self.language_model.config._attn_implementation != "eager":
            return mask
        dtype = self.language_model.get_input_embeddings().weight.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    @property
    def rounded(self) -> bool:
        """Whether the language model computes in half precision by itself; an adapter on it is fp32."""
        return all(p.dtype != torch.float32 for p in self.language_model.parameters())

    def forward(self, **pack: Any) -> Tensor:
        """Summed loss of the supervised tokens of a :class:`~mmphi.text.packing.PackedBatch`, in nats, shape ().

        With hard negatives among its sequences, :func:`~mmphi.models.contrastive_margin.contrastive_margin_loss`.
        """
        rows: PackedBatch = pack  # type: ignore[assignment]  # keyword arguments, so that DDP and the Trainer can pass them
        # Autocast would have its norms and rotations compute in fp32, and copy all that goes in and out of them.
        plain = torch.autocast(rows["input_ids"].device.type, enabled=False) if self.rounded else nullcontext()
        with plain:
            if self._plain_head:
                head = self.language_model.get_output_embeddings()
                hidden = self._hidden(rows)
                losses = linear_cross_entropy(hidden, head.weight, head.bias, rows["targets"], each="foils" in rows)
            else:
                reduction = "none" if "foils" in rows else "sum"
                losses = F.cross_entropy(self.logits(rows).float(), rows["targets"], reduction=reduction)
        return contrastive_margin_loss(losses, rows) if "foils" in rows else losses


@contextmanager
def _gathering(head: nn.Module, keep: Tensor, *, resting: bool = False) -> Iterator[list[Tensor]]:
    """Let a head see only the positions (K,) of the flattened rows; where it shall rest, none. Gives what is there."""
    seen: list[Tensor] = []

    def gather(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_RTW, *rest = inputs
        seen.append(hidden_RTW.flatten(0, 1)[keep])
        return (seen[0][None, :0] if resting else seen[0][None], *rest)

    hook = head.register_forward_pre_hook(gather)
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def _called(compiled: Sequence[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Let something else be called where a layer is."""
    try:
        for layer, call in compiled:
            layer._compiled_call_impl = call
        yield
    finally:
        for layer, _ in compiled:
            layer._compiled_call_impl = None


@torch.no_grad()
def has_plain_head(language_model: Any) -> bool:
    """Whether a model's logits are a linear layer of what its head is given, and nothing else.

    Of such a model the loss can be computed without ever holding all logits. Some scale or cap them, others keep the
    head's weights in a form of their own.
    """
    head = language_model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    ids = torch.arange(4, device=head.weight.device)
    with _gathering(head, ids) as seen:
        logits = language_model(input_ids=ids[None], use_cache=False).logits[0]
    expected = F.linear(seen[0].to(head.weight.dtype), head.weight, head.bias)
    return bool(torch.allclose(logits.float(), expected.float(), rtol=1e-4, atol=1e-4))
