"""Contrastive training of a light CLIP with open_clip's loss: task, batches and callback."""

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

CHUNK = 64  # Images or captions per pass; with more, activations of convolutions exceed a CPU's cache.
ENDS = re.compile(
    r"model\.(visual\.(conv1|attnpool|proj|head)|text\.proj|text_projection|(\w+\.)?positional_embedding)\b"
)


class ContrastiveTask(nn.Module):
    """A CLIP as a training task: images and sets of captions in, the contrastive loss out.

    Precomputed outputs of a frozen encoder may replace its inputs. Under torchrun every process embeds its part of the
    batch, and all parts are gathered, so that each image is compared with the captions of all processes.

    Args:
        model: An open_clip model.
        lock_image: Whether the vision encoder is frozen.
        lock_text: Whether the text encoder is frozen.
        dropout: Dropout rate of a frozen encoder's outputs in training.
        processes: Number of processes that train together.
        rank: Rank of this process.
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
        model.visual.to(memory_format=torch.channels_last)  # The fastest layout for convolutions.
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
        """Set training mode; a frozen vision encoder keeps its running means."""
        super().train(mode)
        if self.image_outputs:
            self.model.visual.trunk.eval()
        elif self.lock_image:
            self.model.visual.eval()
        return self

    def ends(self) -> list[str]:
        """Names of the encoders' first and last parameters, which do not map hidden states to hidden states."""
        return [name for name, _ in self.named_parameters() if ENDS.match(name)]

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit embeddings (N, D) of pixels (N, 3, H, W), or of a frozen encoder's outputs."""
        if images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        head = self.model.visual.head if self.image_outputs else self.model.encode_image
        return F.normalize(head(self._drop(images, self.image_outputs)), dim=-1)

    def embed_texts(self, texts: Tensor) -> Tensor:
        """Unit embeddings (N, D) of tokens (N, L), or of a frozen encoder's outputs."""
        head = self.model.text.proj if self.text_outputs else self.model.encode_text
        return F.normalize(head(self._drop(texts, self.text_outputs)), dim=-1)

    def _drop(self, outputs: Tensor, locked: bool) -> Tensor:
        return F.dropout(outputs, self.dropout, training=self.training and locked)

    def forward(self, images: Tensor, texts: Tensor, step_tokens: Tensor) -> Tensor:
        """Mean loss over the sets of captions, shape ().

        Args:
            images: Pixels of N images, or a frozen encoder's outputs.
            texts: Captions of the same images, (sets, N, ...).
            step_tokens: Number of processes, by which the trainer divides the loss.
        """
        seen, scale = self.embed_images(images), self.model.logit_scale.exp()
        return torch.stack([self.loss(seen, read, scale) for read in self._sets(texts)]).mean()

    def _sets(self, texts: Tensor) -> Tensor:
        """Unit embeddings (sets, N, D) of sets of captions; duplicate captions are encoded once."""
        if self.text_outputs:  # Each has its own dropout mask, so duplicates are not merged.
            return torch.stack([self.embed_texts(one) for one in texts])
        different, place = torch.unique(texts.flatten(0, 1), dim=0, return_inverse=True)
        return self.embed_texts(different)[place].view(*texts.shape[:2], -1)

    @torch.inference_mode()
    def image_inputs(self, pixels: ImageDataset, workers: int) -> Dataset[Tensor] | Tensor:
        """Returns the inputs of :meth:`embed_images`: the pixels, or a frozen encoder's outputs, computed once."""
        if not self.image_outputs:
            return pixels
        device = next(self.parameters()).device
        # Decoded images are available before a worker process would have started.
        loader = DataLoader(pixels, CHUNK, num_workers=0 if pixels.kept else workers)
        batches = (batch.to(device, memory_format=torch.channels_last) for batch in tqdm(loader, "images", leave=False))
        trunk = copy.deepcopy(self.model.visual.trunk)
        fold_batch_norms(trunk, pixels[0][None].to(device))
        trunk.to(memory_format=torch.channels_last)
        outputs = torch.cat([trunk(batch).cpu() for batch in batches])
        release_memory()  # Memory of the convolutions, which training on outputs does not need.
        return outputs.clone()

    @torch.inference_mode()
    def text_inputs(self, tokens: Tensor) -> Tensor:
        """Returns the inputs of :meth:`embed_texts`: the tokens, or a frozen encoder's outputs, computed once."""
        if not self.text_outputs:
            return tokens
        device = next(self.parameters()).device
        # Sorted by length, so that chunks have little padding.
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
    """Output of open_clip's Hugging Face text encoder before its projection."""
    mask = (tokens != text.config.pad_token_id).long()
    longest = int(mask.sum(dim=1).max())
    tokens, mask = tokens[:, :longest], mask[:, :longest]
    pooled: Tensor = text.pooler(text.transformer(input_ids=tokens, attention_mask=mask), mask)
    return pooled


class ImageTextDataset(Dataset[dict[str, Tensor]]):
    """Batches of distinct images and of sets of captions, with one caption per image in each set.

    A pure function of seed and step. Batch ``i`` belongs to step ``i // processes``.

    Args:
        images: Pixels or a frozen encoder's outputs, by image index.
        texts: Tokens or a frozen encoder's outputs of all captions.
        image_of_text: Image index of each caption.
        steps: Optimiser steps.
        batch_size: Images per step, over all processes.
        captions: Number of caption sets per step.
        seed: Seed of the order.
        processes: Number of processes that train together.
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
        # Every process has the same number of images, so that gathered tensors have one shape.
        self.batch_size = max(1, min(batch_size, len(images)) // processes) * processes

    def __len__(self) -> int:
        return self.steps * self.processes

    def step(self, step: int) -> tuple[list[int], list[list[int]]]:
        """Returns the image indices of one step, and the caption indices of each set."""
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
    """Limits the logit scale to 100 (Radford et al. 2021, section 2.5)."""

    def __init__(self, model: Any) -> None:
        self.scale: Tensor = model.logit_scale

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clamp the logarithm of the scale."""
        with torch.no_grad():
            self.scale.clamp_(0, math.log(100))
