"""Packed model for training: packed rows in, summed loss of the supervised tokens out."""

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
from mmphi.models.patches.module_patches import patched
from mmphi.models.patches.sparse_last_layer import WORTH, compute_at_positions, find_positionwise_modules
from mmphi.text.packing import ROWS, Layout, PackedBatch


def block_causal_mask(segments_RT: Tensor, branches_RT: Tensor | None = None) -> Tensor:
    """Causal attention mask within each sequence of packed rows.

    Args:
        segments_RT: Index of each token's sequence in its row; -1 for padding.
        branches_RT: With shared prefixes: 0 in the prefix, then the number of the continuation.

    Returns:
        bool (R, 1, T, T), true where attention is allowed. Padding attends to padding, so that no softmax is empty.
    """
    same = segments_RT[:, None, :, None] == segments_RT[:, None, None, :]
    if branches_RT is not None:
        seen = branches_RT[:, None, None, :]
        same &= (seen == 0) | (seen == branches_RT[:, None, :, None])
    return same.tril()


class PackedVLM(nn.Module):
    """Causal language model whose rows have projected features in place of some token embeddings.

    Logits are computed only at positions that predict a supervised token: a hook gathers the hidden states just before
    the output head, so that operations after the head (scaling, soft caps) still apply. The hook is removed after each
    forward pass; the language model is not changed permanently.

    Args:
        language_model: A Hugging Face causal LM, frozen or not.
        layout: How sequences are packed. Models that leak across packed sequences need one per row, see
            :func:`~mmphi.models.language.packing_check.packing_error`.
        **projectors: Projector of each kind of span, by kind.
    """

    def __init__(self, language_model: Any, *, layout: Layout = ROWS, **projectors: nn.Module) -> None:
        super().__init__()
        self.language_model, self.layout = language_model, layout
        self.projectors: Any = nn.ModuleDict(projectors)
        self._recomputing: list[Any] = []
        self._recomputes = False
        self.compiled: Sequence[tuple[nn.Module, Any]] = ()  # Layers and their compiled calls in training.
        if language_model.get_output_embeddings() is None:
            raise ModelError(f"{type(language_model).__name__} has no output head", "use a causal language model")
        self._plain_head = has_plain_head(language_model)
        self._last_parts: list[nn.Module] | None = None  # Found at first use.

    @property
    def frozen(self) -> bool:
        """Whether no parameter of the language model is trained, except those of an adapter."""
        parameters = self.language_model.named_parameters()
        return not any(p.requires_grad for name, p in parameters if "lora_" not in name)

    def train(self, mode: bool = True) -> Self:
        """Set training mode; a frozen language model stays in eval mode, except for adapter dropout."""
        super().train(mode)
        if self.frozen:
            self.language_model.eval()
            for layer in self.language_model.modules():
                if hasattr(layer, "lora_dropout"):  # An adapter that is trained applies dropout.
                    layer.training = mode
                    layer.lora_dropout.train(mode)
            for layer in self._recomputing:
                layer.training = mode
        return self

    @contextmanager
    def recomputing(self, wanted: bool = True) -> Iterator[None]:
        """Recompute the language model's activations in the backward pass, to save memory.

        transformers' layers recompute only in training mode, in which a frozen model would apply dropout. In a frozen
        model only these layers are put into training mode, with their own dropout set to 0.
        """
        if not wanted:
            yield
            return
        model = self.language_model
        # transformers renamed the methods in 5.2x; non-reentrant checkpointing needs no gradient at the input.
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
            # The backward pass recomputes attention.
            with patched(self.language_model, "training") if self.layout.kind == "line" else nullcontext():
                yield
        finally:
            for layer, rate in rates:
                layer.training = False
                if isinstance(rate, float):
                    layer.dropout = rate
            self._recomputing, self._recomputes = [], False
            end()
            model.disable_input_require_grads()  # Some versions of transformers enable them with checkpointing.

    def embed(self, input_ids: Tensor, features: Any, places: Any) -> Tensor:
        """Embeddings (R, T, W) of tokens, with the projected features (P, D) of each kind at its places (P,)."""
        embeddings: Tensor = self.language_model.get_input_embeddings()(input_ids)
        flat = embeddings.flatten(0, 1)
        for kind, projector in self.projectors.items():
            seen = features.get(kind)
            if seen is None or not len(seen):
                # A pack without features still runs the projector: DDP expects every parameter to take part.
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
        """Inputs of the head (K, W) at the positions that predict a supervised token; the head computes no rows."""
        head = self.language_model.get_output_embeddings()
        with self._last_layer(pack), _gathering(head, pack["keep"], resting=True) as seen:
            self._run(pack)
        return seen[0]

    def _last_layer(self, pack: PackedBatch) -> AbstractContextManager[None]:
        """Context in which the last layer computes only positions with a target, where that saves time.

        Compiled and recomputed layers compute all positions.
        """
        keep = pack["keep"]
        if len(keep) > WORTH * pack["input_ids"].numel() or self._recomputes or (self.training and self.compiled):
            return nullcontext()
        if self._last_parts is None:
            self._last_parts = find_positionwise_modules(self.language_model)
        # Answers with a shared prefix are predicted from the same position.
        return compute_at_positions(self._last_parts, torch.unique(keep) if "branches" in pack else keep)

    def _in_line(self, pack: PackedBatch) -> bool:
        """Whether a pack is one row with borders; with this layout the model accepts masked rows, too."""
        return self.layout.kind == "line" and "borders" in pack

    def _walled(self, pack: PackedBatch) -> AbstractContextManager[None]:
        return patched(self.language_model, "training") if self._in_line(pack) else nullcontext()

    def _walls(self, pack: PackedBatch) -> dict[str, Any]:
        """Arguments that isolate sequences: a padding mask for one per row, borders, or a block mask."""
        if self.layout.kind == "alone":
            return {"attention_mask": (pack["segments"] >= 0).long()}
        if self._in_line(pack):
            # transformers does not expand a four-dimensional mask, so no mask over the whole row is built.
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
        """Whether no parameter of the language model is fp32; those of an adapter are."""
        return all(p.dtype != torch.float32 for p in self.language_model.parameters())

    def forward(self, **pack: Any) -> Tensor:
        """Summed loss of the supervised tokens of a :class:`~mmphi.text.packing.PackedBatch`, in nats, shape ().

        Packs with hard negatives use :func:`~mmphi.models.contrastive_margin.contrastive_margin_loss`.
        """
        rows: PackedBatch = pack  # type: ignore[assignment]  # Keyword arguments are needed by DDP and the Trainer.
        # Autocast would compute norms and rotary embeddings in fp32, and copy their inputs and outputs.
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
    """Pass only the positions (K,) of the flattened rows to a head, or none if ``resting``; yields their inputs."""
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
    """Call the compiled version of each layer in its place."""
    try:
        for layer, call in compiled:
            layer._compiled_call_impl = call
        yield
    finally:
        for layer, _ in compiled:
            layer._compiled_call_impl = None


@torch.no_grad()
def has_plain_head(language_model: Any) -> bool:
    """Whether a model's logits are exactly a linear layer of the head's inputs.

    The loss of such a model can be computed without materialising all logits. Other models scale or cap their logits,
    or store the head's weights in another form.
    """
    head = language_model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    ids = torch.arange(4, device=head.weight.device)
    with _gathering(head, ids) as seen:
        logits = language_model(input_ids=ids[None], use_cache=False).logits[0]
    expected = F.linear(seen[0].to(head.weight.dtype), head.weight, head.bias)
    return bool(torch.allclose(logits.float(), expected.float(), rtol=1e-4, atol=1e-4))
