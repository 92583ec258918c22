"""Contrastive training of a light CLIP with open_clip's own loss: batches of images and captions, on the one loop."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from open_clip import ClipLoss
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmphi.allocator import release_memory
from mmphi.models.patches.bn_folding import fold_batch_norms
from mmphi.training.image_dataset import ImageDataset

CHUNK = 64  # Images or captions in one pass: of more, what convolutions make leaves a processor's cache.
ENDS = re.compile(
    r"model\.(visual\.(conv1|attnpool|proj|head)|text\.proj|text_projection|(\w+\.)?positional_embedding)\b"
)


class ContrastiveTask(nn.Module):
    """A CLIP as a task: images and sets of captions in, the contrastive loss out.

    The outputs of a locked tower may be given in place of what it takes. Under torchrun every process embeds its own
    part of the batch, and all parts are gathered, so that each image meets the captions of all processes.

    Args:
        model: An open_clip model.
        lock_image: Whether the vision encoder stays as it is.
        lock_text: Whether the text tower stays as it is.
        dropout: Share of a locked tower's outputs dropped in training.
        processes: That train together.
        rank: This process's number.
    """

    def __init__(
        self,
        model: Any,
        *,
        lock_image: bool = False,
        lock_text: bool = False,
        dropout: float = 0.0,
        processes: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__()
        model.visual.to(memory_format=torch.channels_last)  # As convolutions are computed fastest.
        self.model, self.dropout = model, dropout
        trunk = getattr(model.visual, "trunk", None)
        text = getattr(model, "text", None)
        if lock_image:
            (trunk if trunk is not None else model.visual).requires_grad_(False)
        if lock_text:
            (text.transformer if text is not None else model.transformer).requires_grad_(False)
        self.image_outputs = lock_image and trunk is not None
        self.text_outputs = lock_text and hasattr(text, "pooler")
        self.lock_image = lock_image
        options = {"gather_with_grad": True} if processes > 1 else {}
        self.loss = ClipLoss(rank=rank, world_size=processes, **options)

    def train(self, mode: bool = True) -> Self:
        """Set training mode; a locked tower keeps its running means."""
        super().train(mode)
        if self.image_outputs:
            self.model.visual.trunk.eval()
        elif self.lock_image:
            self.model.visual.eval()
        return self

    def ends(self) -> list[str]:
        """Names of the parameters that its towers begin and end with: no hidden states on one of their sides."""
        return [name for name, _ in self.named_parameters() if ENDS.match(name)]

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit embeddings of pixels (N, 3, H, W), or of the outputs of a locked tower."""
        if images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        head = self.model.visual.head if self.image_outputs else self.model.encode_image
        return F.normalize(head(self._drop(images, self.image_outputs)), dim=-1)

    def embed_texts(self, texts: Tensor) -> Tensor:
        """Unit embeddings of tokens (N, L), or of the outputs of a locked tower."""
        head = self.model.text.proj if self.text_outputs else self.model.encode_text
        return F.normalize(head(self._drop(texts, self.text_outputs)), dim=-1)

    def _drop(self, outputs: Tensor, locked: bool) -> Tensor:
        return F.dropout(outputs, self.dropout, training=self.training and locked)

    def forward(self, images: Tensor, texts: Tensor, step_tokens: Tensor) -> Tensor:
        """Mean loss over the sets of captions, shape ().

        Args:
            images: Of N images.
            texts: Captions of the same images, (sets, N, ...).
            step_tokens: How many processes there are; the loop divides by it.
        """
        seen, scale = self.embed_images(images), self.model.logit_scale.exp()
        return torch.stack([self.loss(seen, read, scale) for read in self._sets(texts)]).mean()

    def _sets(self, texts: Tensor) -> Tensor:
        """Unit embeddings (sets, N, D) of sets of captions; a caption that several images have is read once."""
        if self.text_outputs:  # What is dropped of them is drawn for each by itself.
            return torch.stack([self.embed_texts(one) for one in texts])
        different, place = torch.unique(texts.flatten(0, 1), dim=0, return_inverse=True)
        return self.embed_texts(different)[place].view(*texts.shape[:2], -1)

    @torch.inference_mode()
    def image_inputs(self, pixels: ImageDataset, workers: int) -> Dataset[Tensor] | Tensor:
        """What images are trained from: pixels as they are asked for, or a locked tower's outputs, computed once."""
        if not self.image_outputs:
            return pixels
        device = next(self.parameters()).device
        # What is decoded already is here sooner than another process.
        loader = DataLoader(pixels, CHUNK, num_workers=0 if pixels.kept else workers)
        batches = (batch.to(device, memory_format=torch.channels_last) for batch in tqdm(loader, "images", leave=False))
        trunk = copy.deepcopy(self.model.visual.trunk)
        fold_batch_norms(trunk, pixels[0][None].to(device))
        trunk.to(memory_format=torch.channels_last)
        outputs = torch.cat([trunk(batch).cpu() for batch in batches])
        release_memory()  # No training from outputs needs what convolutions do.
        return outputs.clone()

    @torch.inference_mode()
    def text_inputs(self, tokens: Tensor) -> Tensor:
        """What the captions are trained from: tokens, or a locked tower's outputs, computed once."""
        if not self.text_outputs:
            return tokens
        device = next(self.parameters()).device
        # Shortest first, so that chunks are padded to what they need.
        order = (tokens != self.model.text.config.pad_token_id).sum(dim=1).argsort()
        chunks = [_pooled(self.model.text, tokens[part].to(device)).cpu() for part in _chunks(order)]
        pooled = torch.cat(chunks)
        outputs = torch.empty_like(pooled)
        outputs[order] = pooled
        return outputs.clone()

    @torch.inference_mode()
    def all_embeddings(self, images: Any, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings of all images and all captions, on the CPU."""
        self.eval()
        device = next(self.parameters()).device
        seen = [self.embed_images(part.to(device)).cpu() for part in DataLoader(images, CHUNK)]
        read = [self.embed_texts(part.to(device)).cpu() for part in _chunks(texts)]
        return torch.cat(seen), torch.cat(read)


def _chunks(rows: Tensor) -> list[Tensor]:
    return [rows[first : first + CHUNK] for first in range(0, len(rows), CHUNK)]


def _pooled(text: Any, tokens: Tensor) -> Tensor:
    """What open_clip's Hugging Face text tower computes before its projection."""
    mask = (tokens != text.config.pad_token_id).long()
    longest = int(mask.sum(dim=1).max())
    tokens, mask = tokens[:, :longest], mask[:, :longest]
    pooled: Tensor = text.pooler(text.transformer(input_ids=tokens, attention_mask=mask), mask)
    return pooled


class ImageTextDataset(Dataset[dict[str, Tensor]]):
    """The batches of every step: different images, and sets of captions that hold one caption of each.

    A pure function of seed and step. Batch ``i`` belongs to step ``i // processes``.

    Args:
        images: By index: pixels, or outputs of a locked tower.
        texts: Of all captions.
        image_of_text: For each caption the index of its image.
        steps: Optimiser steps.
        batch_size: Images per step, over all processes.
        captions: Sets of captions.
        seed: Of the order.
        processes: That train together.
    """

    def __init__(
        self,
        images: Any,
        texts: Tensor,
        image_of_text: Sequence[int],
        *,
        steps: int,
        batch_size: int,
        captions: int,
        seed: int,
        processes: int = 1,
    ) -> None:
        self.images, self.texts, self.steps, self.captions, self.seed = images, texts, steps, captions, seed
        self.processes = processes
        self._captions_of: list[list[int]] = [[] for _ in range(len(images))]
        for text, image in enumerate(image_of_text):
            self._captions_of[image].append(text)
        # Every process has as many as the others, so that what is gathered has one shape.
        self.batch_size = max(1, min(batch_size, len(images)) // processes) * processes

    def __len__(self) -> int:
        return self.steps * self.processes

    def step(self, step: int) -> tuple[list[int], list[list[int]]]:
        """Indices of the images of one step, and of the captions of each set."""
        per_epoch = max(1, len(self.images) // self.batch_size)
        epoch, place = divmod(step, per_epoch)
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.images))[place * self.batch_size : (place + 1) * self.batch_size].tolist()
        own = [self._captions_of[image] for image in order]
        turn = [epoch * self.captions + image for image in order]
        sets = [[c[(t + k) % len(c)] for c, t in zip(own, turn, strict=True)] for k in range(self.captions)]
        return order, sets

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        step, rank = divmod(index, self.processes)
        order, sets = self.step(step)
        share = self.batch_size // self.processes
        mine = slice(rank * share, (rank + 1) * share)
        return {
            "images": torch.stack([self.images[i] for i in order[mine]]),
            "texts": torch.stack([self.texts[chosen[mine]] for chosen in sets]),
            "step_tokens": torch.tensor(float(self.processes)),
        }


class ClampLogitScaleCallback(TrainerCallback):
    """Keeps the logit scale at 100 at most (Radford et al. 2021, section 2.5)."""

    def __init__(self, model: Any) -> None:
        self.scale: Tensor = model.logit_scale

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clamp."""
        with torch.no_grad():
            self.scale.clamp_(0, math.log(100))
