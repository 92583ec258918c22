"""A causal language model that reads image features where its prompt has places for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmphi.data.packing import Pack, packs, to_device
from mmphi.data.records import Example, ImageRef
from mmphi.data.sequences import Sample, encode, join
from mmphi.errors import ModelError
from mmphi.models.generation import Answer, answers_to

if TYPE_CHECKING:
    from mmphi.data.features import ImageFeatures
    from mmphi.models.language import Language
    from mmphi.models.projector import Projector


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
    """What training runs: packed rows in, the summed loss of the supervised tokens out.

    Logits are computed only where a token is predicted: the hidden states are gathered just before the output head,
    by a hook, so that whatever the model does after its head (scaling, soft caps) still happens.

    Args:
        language_model: A Hugging Face causal LM, frozen or not.
        projector: From image features to its embeddings; ``None`` for text alone.
    """

    def __init__(self, language_model: Any, projector: Projector | None = None) -> None:
        super().__init__()
        self.language_model = language_model
        self.projector = projector
        self._keep: Tensor | None = None
        self._recomputes = False
        head = language_model.get_output_embeddings()
        if head is None:
            raise ModelError(f"{type(language_model).__name__} has no output head", "use a causal language model")
        head.register_forward_pre_hook(self._gather)

    def _gather(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._keep is None:
            return inputs
        hidden_RTW, *rest = inputs
        return (hidden_RTW.flatten(0, 1)[self._keep][None], *rest)

    def train(self, mode: bool = True) -> Self:
        """Set training mode; a frozen language model stays without dropout unless it recomputes activations."""
        super().train(mode)
        if not any(p.requires_grad for p in self.language_model.parameters()):
            self.language_model.train(mode and self._recomputes)
        return self

    def recompute_activations(self) -> None:
        """Trade time for memory: keep no activations inside the language model's layers."""
        # transformers renamed the method in 5.2x; non-reentrant recomputing needs no gradient at the input.
        current = getattr(self.language_model, "activation_checkpointing_enable", None)
        (current or self.language_model.gradient_checkpointing_enable)({"use_reentrant": False})
        self._recomputes = True

    def embed(self, input_ids: Tensor, image_mask: Tensor, features: Tensor) -> Tensor:
        """Embeddings (R, T, W) of tokens, with projected features (N, F, D) at the places of ``image_mask`` (R, T)."""
        embeddings: Tensor = self.language_model.get_input_embeddings()(input_ids)
        if self.projector is None:
            return embeddings
        if not len(features):
            # Nothing to see in this pack; the projector still takes part, as DDP expects of every parameter.
            features = features.new_zeros(0, 1, self.projector.config.input_width)
        projected = self.projector(features).to(embeddings.dtype)
        return embeddings.masked_scatter(image_mask[..., None], projected)

    def logits(self, pack: Pack) -> Tensor:
        """Logits (K, V) at the positions that predict a supervised token."""
        self._keep = pack["keep"]
        try:
            output = self.language_model(
                inputs_embeds=self.embed(pack["input_ids"], pack["image_mask"], pack["features"]),
                attention_mask=self._mask(pack["segments"]),
                position_ids=pack["position_ids"],
                use_cache=False,
            )
        finally:
            self._keep = None
        logits: Tensor = output.logits[0]
        return logits

    def _mask(self, segments_RT: Tensor) -> Tensor:
        mask = block_causal_mask(segments_RT)
        if self.language_model.config._attn_implementation != "eager":
            return mask
        dtype = self.language_model.get_input_embeddings().weight.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    def forward(self, **pack: Any) -> Tensor:
        """Summed loss of the supervised tokens of a :class:`~mmphi.data.packing.Pack`, in nats, shape ()."""
        rows: Pack = pack  # type: ignore[assignment]  # keyword arguments, so that DDP and the Trainer can pass them
        return F.cross_entropy(self.logits(rows).float(), rows["targets"], reduction="sum")


class Multimodal:
    """Image and text in, text out: language model, projector and features joined.

    Args:
        language: The language model with its tokenizer and prompt.
        projector: Fits both sides; ``None`` for text alone.
        features: Where image features come from.
        max_length: Longest sequence, in tokens.

    Raises:
        ModelError: If the projector does not fit the features or the language model.
    """

    def __init__(
        self,
        language: Language,
        projector: Projector | None,
        features: ImageFeatures | None,
        max_length: int = 512,
    ) -> None:
        if projector is not None and features is not None:
            projector.check_fits(features.width, language.width)
            projector.to(device=next(language.model.parameters()).device)
        self.language, self.features, self.max_length = language, features, max_length
        self.packed = PackedModel(language.model, projector).eval()

    @property
    def device(self) -> torch.device:
        """Where the language model lies."""
        parameter: Tensor = next(self.language.model.parameters())
        return parameter.device

    @property
    def image_tokens(self) -> int:
        """Places an image takes in a prompt."""
        return self.features.tokens if self.features is not None else 0

    def can_see(self, example: Example) -> bool:
        """Whether the example's image, if it has one, has features."""
        return example.image is None or (self.features is not None and example.image.id in self.features)

    @torch.inference_mode()
    def losses(
        self, examples: Sequence[Example], images: Sequence[ImageRef | None] | None = None, max_tokens: int = 4096
    ) -> tuple[float, int]:
        """Loss on the answers of conversations.

        Args:
            examples: Conversations; those that do not fit in ``max_length`` are left out.
            images: Images to show in place of the examples' own.
            max_tokens: Tokens per forward pass.

        Returns:
            Summed nats, and the number of supervised tokens.
        """
        if images is not None:
            examples = [replace(e, image=image) for e, image in zip(examples, images, strict=True)]
        found = (encode(e, self.language.prompt, self.image_tokens, self.max_length) for e in examples)
        nats, tokens = 0.0, 0
        for pack in packs([s for s in found if s is not None], self.features, max_tokens):
            nats += float(self.packed(**to_device(pack, self.device)))
            tokens += len(pack["targets"])
        return nats, tokens

    def generate(
        self, prompts: Sequence[tuple[ImageRef | None, str]], max_new_tokens: int = 48, batch_size: int = 32
    ) -> list[Answer]:
        """Answer questions, greedily.

        Args:
            prompts: An image or none, and a question (empty for a caption).
            max_new_tokens: Longest answer, in tokens.
            batch_size: Answers generated at once; batched and single answers are the same.

        Returns:
            One answer per prompt, in order.
        """
        found = answers_to(self, self._prompts(prompts), batch_size, max_new_tokens=max_new_tokens, do_sample=False)
        return [answer for (answer,) in found]

    def sample(
        self,
        prompts: Sequence[tuple[ImageRef | None, str]],
        count: int,
        temperature: float,
        max_new_tokens: int = 48,
        batch_size: int = 32,
        seed: int = 0,
    ) -> list[list[Answer]]:
        """Draw several answers to each question.

        Args:
            prompts: An image or none, and a question (empty for a caption).
            count: Answers to each.
            temperature: The logits are divided by it; near 0 all answers are the greedy one.
            max_new_tokens: Longest answer, in tokens.
            batch_size: Answers generated at once.
            seed: Equal seeds (and batch sizes) give equal answers; the caller's random state is left as it was.

        Returns:
            ``count`` answers per prompt, in order.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            return answers_to(
                self,
                self._prompts(prompts),
                max(1, batch_size // count),
                max_new_tokens=max_new_tokens,
                do_sample=True,
                num_return_sequences=count,
                temperature=temperature,
                top_k=0,  # The whole distribution, whatever the model's own generation settings say.
                top_p=1.0,
            )

    def _prompts(self, prompts: Sequence[tuple[ImageRef | None, str]]) -> list[Sample]:
        return [
            join(
                self.language.prompt.parts([(question, None)], image=image is not None),
                image,
                self.image_tokens if image is not None else 0,
            )
            for image, question in prompts
        ]
