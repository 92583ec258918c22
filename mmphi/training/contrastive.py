"""Contrastive training of a light CLIP with open_clip's own loss; frozen towers are run once."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip import ClipLoss
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from mmphi.errors import Stopped, TrainingError
from mmphi.settings import LightClipSettings
from mmphi.stage import Tracker
from mmphi.training.callbacks import StopWhenAsked
from mmphi.training.checkpoints import complete_checkpoints, mark_complete, prune, step_of

CHUNK = 128


class Pairs:
    """Images and captions as the trainable part of a model takes them.

    Where a tower is locked, its outputs are computed once and stand here in place of pixels or tokens.

    Args:
        model: An open_clip model.
        images: Preprocessed pixels (N, 3, H, W).
        tokens: Tokens of the captions (M, L).
        image_of_text: For each caption the index of its image.
        lock_image: Whether the image tower stays as it is.
        lock_text: Whether the text tower stays as it is.
        dropout: Share of a locked tower's outputs dropped in training.
    """

    def __init__(
        self,
        model: Any,
        images: Tensor,
        tokens: Tensor,
        image_of_text: Sequence[int],
        *,
        lock_image: bool,
        lock_text: bool,
        dropout: float = 0.0,
    ) -> None:
        self.model, self.dropout = model, dropout
        self._captions_of: list[list[int]] = [[] for _ in images]
        for text, image in enumerate(image_of_text):
            self._captions_of[image].append(text)
        self._image_head: Callable[[Tensor], Tensor] = model.encode_image
        self._text_head: Callable[[Tensor], Tensor] = model.encode_text
        self.images, self.texts = images, tokens
        if lock_image and hasattr(model.visual, "trunk"):
            self.images = _run(model.visual.trunk, images)
            self._image_head = model.visual.head
        if lock_text and hasattr(model, "text") and hasattr(model.text, "pooler"):
            # Shortest first, so that chunks are padded to what they need.
            order = (tokens != model.text.config.pad_token_id).sum(dim=1).argsort()
            pooled = _run(lambda t: _pooled(model.text, t), tokens[order])
            self.texts = torch.empty_like(pooled)
            self.texts[order] = pooled
            self._text_head = model.text.proj

    def embed_images(self, index: Tensor) -> Tensor:
        """Unit embeddings of the images at ``index``."""
        locked = self._image_head != self.model.encode_image
        return F.normalize(self._image_head(self._drop(self.images[index], locked)), dim=-1)

    def embed_texts(self, index: Tensor) -> Tensor:
        """Unit embeddings of the captions at ``index``."""
        locked = self._text_head != self.model.encode_text
        return F.normalize(self._text_head(self._drop(self.texts[index], locked)), dim=-1)

    def _drop(self, features: Tensor, locked: bool) -> Tensor:
        return F.dropout(features, self.dropout, training=self.model.training and locked)

    @torch.inference_mode()
    def all_embeddings(self) -> tuple[Tensor, Tensor]:
        """Unit embeddings of all images and all captions."""
        self.model.eval()
        images = [self.embed_images(i) for i in _chunks(len(self.images))]
        texts = [self.embed_texts(i) for i in _chunks(len(self.texts))]
        return torch.cat(images), torch.cat(texts)

    def step(self, step: int, batch_size: int, captions: int, seed: int) -> tuple[Tensor, list[Tensor]]:
        """Indices of one step: different images, and sets of captions that hold one caption of each.

        Args:
            step: Number of the step.
            batch_size: Images.
            captions: Sets of captions.
            seed: Seed of the order.
        """
        batch_size = min(batch_size, len(self.images))
        per_epoch = len(self.images) // batch_size
        epoch, place = divmod(step, per_epoch)
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(self.images))[place * batch_size : (place + 1) * batch_size]
        own = [self._captions_of[int(image)] for image in order]
        turn = [epoch * captions + int(image) for image in order]
        sets = [[c[(t + k) % len(c)] for c, t in zip(own, turn, strict=True)] for k in range(captions)]
        return torch.from_numpy(order), [torch.tensor(chosen) for chosen in sets]


@torch.inference_mode()
def _run(tower: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    return torch.cat([tower(inputs[part]) for part in _chunks(len(inputs))]).clone()


def _chunks(count: int) -> list[Tensor]:
    return [torch.arange(first, min(count, first + CHUNK)) for first in range(0, count, CHUNK)]


def _pooled(text: Any, tokens: Tensor) -> Tensor:
    """What open_clip's Hugging Face text tower computes before its projection."""
    mask = (tokens != text.config.pad_token_id).long()
    longest = int(mask.sum(dim=1).max())
    tokens, mask = tokens[:, :longest], mask[:, :longest]
    pooled: Tensor = text.pooler(text.transformer(input_ids=tokens, attention_mask=mask), mask)
    return pooled


def train_clip(
    model: Any, pairs: Pairs, chosen: LightClipSettings, *, seed: int, folder: Path, tracker: Tracker
) -> None:
    """Train what is not locked; goes on from the newest complete checkpoint in ``folder``.

    Raises:
        TrainingError: If the loss stops being finite.
        Stopped: If a signal asked to stop; a checkpoint was written first.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    state = {**trained, **dict(model.named_buffers())}  # Buffers: batch norms keep running means.
    matrices = [p for p in trained.values() if p.ndim > 1]
    others = [p for p in trained.values() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": chosen.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=chosen.learning_rate,
        betas=(0.9, 0.98),
        eps=1e-6,  # CLIP's (Radford et al. 2021, table 20)
    )
    begin = _resume(folder, state, optimizer, tracker)
    loss_of = ClipLoss()
    losses: dict[int, float] = {}
    with StopWhenAsked() as stop, tqdm(total=chosen.steps, initial=begin, desc="light_clip", unit="step") as bar:
        for step in range(begin, chosen.steps):
            for group in optimizer.param_groups:
                group["lr"] = chosen.learning_rate * _schedule(step, chosen)
            images, sets = pairs.step(step, chosen.batch_size, chosen.captions, seed)
            torch.manual_seed(seed * 1_000_003 + step)  # Dropout by step, so that a resumed run draws the same.
            model.train()
            if hasattr(model.visual, "trunk") and not any(p.requires_grad for p in model.visual.trunk.parameters()):
                model.visual.trunk.eval()
            seen, scale = pairs.embed_images(images), model.logit_scale.exp()
            loss: Any = torch.stack([loss_of(seen, pairs.embed_texts(texts), scale) for texts in sets]).mean()
            if not torch.isfinite(loss):
                raise TrainingError(f"the loss at step {step + 1} is {loss.item()}", "lower light_clip.learning_rate")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            done = step + 1
            losses[done] = float(loss.detach())
            bar.update()
            if done % chosen.log_every == 0 or done == chosen.steps:
                tracker.metrics({"train/loss": losses[done], "train/lr": optimizer.param_groups[0]["lr"]}, done)
                bar.set_postfix(loss=f"{losses[done]:.3f}", refresh=False)
            if done < chosen.steps and (stop.asked or done % chosen.save_every == 0):
                _save(folder / f"checkpoint-{done}", state, optimizer)
                prune(folder, 1)
            if stop.asked and done < chosen.steps:
                raise Stopped(f"stopped after step {done}; the same command goes on from there")
    for path in complete_checkpoints(folder):
        shutil.rmtree(path)


def _schedule(step: int, chosen: LightClipSettings) -> float:
    """Linear warm-up, then cosine to zero."""
    warm = max(1, round(chosen.warmup * chosen.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, chosen.steps - warm)))


def _save(checkpoint: Path, kept: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    checkpoint.mkdir(parents=True, exist_ok=True)
    save_file({n: p.detach().contiguous() for n, p in kept.items()}, checkpoint / "weights.safetensors")
    state = optimizer.state_dict()["state"]
    flat = {f"{i}.{k}": v.contiguous() for i, s in state.items() for k, v in s.items()}
    save_file(flat, checkpoint / "optimizer.safetensors")
    mark_complete(checkpoint)


def _resume(folder: Path, kept: dict[str, Any], optimizer: torch.optim.Optimizer, tracker: Tracker) -> int:
    found = complete_checkpoints(folder)
    if not found:
        return 0
    with torch.no_grad():
        for name, tensor in load_file(found[-1] / "weights.safetensors").items():
            kept[name].copy_(tensor)
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(found[-1] / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    tracker.say(f"light_clip: going on from step {step_of(found[-1])}")
    return step_of(found[-1])
