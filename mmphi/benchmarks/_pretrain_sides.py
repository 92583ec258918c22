"""Implementations that ``mmphi benchmark pretrain`` compares."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmphi.config import TrainingSettings
    from mmphi.training.throughput import StepLoss

RATE = 1e-3


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and the batch; ``passes`` is the number of forward passes of a step of the side ``sorted``."""

    layers: int = 6
    width: int = 160
    heads: int = 5
    vocabulary: int = 51200
    context: int = 512
    batch_tokens: int = 8192
    shortest: int = 24
    precision: str = "fp32"
    passes: int = 8


SHAPES = {
    "10M": Shape(),
    "tiny": Shape(2, 32, 2, 300, 32, 128, 4, passes=2),
    "124M": Shape(12, 768, 12, 51200, 1024, 65536, 32, "bf16"),
}


def documents(shape: Shape, step: int, kind: str) -> list[list[int]]:
    """Token IDs of the documents of a step, which have ``batch_tokens`` predictions in total.

    Documents of the kind ``mixed`` have log-uniform lengths, as texts do; others have the full context length.
    """
    import numpy as np

    rng, left, made = np.random.default_rng(step), shape.batch_tokens, []
    while left:
        length = shape.context
        if kind == "mixed":
            length = round(float(np.exp(rng.uniform(np.log(shape.shortest), np.log(shape.context)))))
        length = min(length, left)
        made.append(rng.integers(1, shape.vocabulary, length + 1).tolist())
        left -= length
    return made


def passes(shape: Shape, step: int, kind: str, way: str) -> list[list[list[int]]]:
    """Documents of each forward pass of a step: several passes by length for ``sorted``, otherwise one."""
    each = documents(shape, step, kind)
    if way != "sorted":
        return [each]
    if len(each) < shape.passes:
        raise ValueError(f"{len(each)} documents do not fill {shape.passes} passes")
    each.sort(key=len)
    cuts = [round(i * len(each) / shape.passes) for i in range(shape.passes + 1)]
    return [each[first:last] for first, last in itertools.pairwise(cuts)]


def positions(shape: Shape, steps: int, kind: str, side: str) -> int:
    """Number of positions that a side computes in some steps, padding included."""
    if side not in ("padded", "sorted"):
        return steps * shape.batch_tokens
    rows = [batch for step in range(steps) for batch in passes(shape, step, kind, side)]
    return sum(len(batch) * (max(map(len, batch)) - 1) for batch in rows)


def build(shape: Shape) -> Any:
    """Initial model of all sides."""
    import torch
    from transformers import PhiForCausalLM

    from mmphi.models.language.phi import phi_config

    torch.manual_seed(0)
    config = phi_config(shape.layers, shape.width, shape.heads, shape.context, shape.vocabulary, 0)
    config._attn_implementation = "sdpa"
    return PhiForCausalLM(config)


def groups(model: Any) -> list[dict[str, Any]]:
    """Parameter groups with and without weight decay; vectors and embeddings have none."""
    vectors = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    kept = {id(p) for p in vectors}
    return [
        {"params": [p for p in model.parameters() if id(p) not in kept], "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]


class Clock:
    """Records the end time and the loss of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.ends = [time.perf_counter()]

    def step(self, loss: float) -> None:
        """Record the end of a step."""
        self.losses.append(loss)
        self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Duration of each step, in seconds."""
        return [b - a for a, b in zip(self.ends[:-1], self.ends[1:], strict=True)]

    def callback(self, losses: StepLoss | None = None) -> Any:
        """Callback of transformers' Trainer that starts the clock and records the steps.

        Args:
            losses: Loss accumulator of the training; by default the losses are those that the Trainer logs.
        """
        from transformers import TrainerCallback

        clock = self

        class Ends(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                clock.ends = [time.perf_counter()]

            def on_step_end(self, args: Any, *_: Any, **__: Any) -> None:
                if losses is not None:
                    clock.step(losses.take(args.device))

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                if losses is None and "loss" in (logs or {}):
                    clock.step(logs["loss"])

        return Ends()


def trainer_arguments(folder: str, steps: int, rate: float, **options: Any) -> Any:
    """Arguments of transformers' Trainer with a constant learning rate, one device and the loss of every step."""
    import torch
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        **options,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def own_settings(steps: int, rate: float, **options: Any) -> TrainingSettings:
    """Settings of mmphi's training with a constant learning rate, and no checkpoint or validation between steps."""
    from mmphi.config import TrainingSettings

    never = dict.fromkeys(("save_every", "eval_every", "log_every"), 10 * steps)
    return TrainingSettings(
        steps=steps, learning_rate=rate, lr_scheduler="constant", warmup_ratio=0.0, **never, **options
    )


def trainer_side(shape: Shape, steps: int, kind: str, way: str) -> Clock:
    """Train under transformers' Trainer.

    Args:
        shape: Sizes of the model and the batch.
        steps: Number of steps.
        kind: Kind of documents, ``mixed`` or ``rows``.
        way: ``padded`` or ``packed``: one batch of all documents of a step; ``sorted``: several padded batches.
    """
    import torch
    from transformers import (
        DataCollatorForSeq2Seq,
        DataCollatorWithFlattening,
        PreTrainedTokenizerFast,
        Trainer,
    )

    from mmphi.models.device import this_device
    from mmphi.text.tokenizer import train_bpe

    model, clock = build(shape).to(this_device()), Clock()
    model.config.use_cache = False  # With a cache the documents of a packed row attend to one another.
    each = [batch for step in range(steps) for batch in passes(shape, step, kind, way)]
    flat = [{"input_ids": ids, "labels": ids} for batch in each for ids in batch]
    sizes = [len(batch) for batch in each]

    class Batches(torch.utils.data.Sampler[list[int]]):
        def __iter__(self) -> Iterator[list[int]]:
            first = 0
            for size in sizes:
                yield list(range(first, first + size))
                first += size

        def __len__(self) -> int:
            return len(sizes)

    tokenizer: PreTrainedTokenizerFast = train_bpe(["a b c"], 300)
    tokenizer.pad_token = tokenizer.eos_token
    collator: Any = DataCollatorWithFlattening() if way == "packed" else DataCollatorForSeq2Seq(tokenizer)

    class Given(Trainer):
        def get_train_dataloader(self) -> Any:
            rows: Any = flat
            loader: Any = torch.utils.data.DataLoader(rows, batch_sampler=Batches(), collate_fn=collator)
            return self.accelerator.prepare(loader)

    with tempfile.TemporaryDirectory() as folder:
        own = {"gradient_accumulation_steps": len(each) // steps, "weight_decay": 0.1, "adam_beta2": 0.95}
        arguments = trainer_arguments(folder, steps, RATE, bf16=shape.precision == "bf16", **own)
        optimizer = torch.optim.AdamW(groups(model), lr=RATE, betas=(0.9, 0.95))
        given: dict[str, Any] = {"train_dataset": flat, "callbacks": [clock.callback()]}
        Given(model=model, args=arguments, optimizers=(optimizer, None), **given).train()
    return clock


def loop_side(shape: Shape, steps: int, kind: str, *, compiled: bool = False) -> Clock:
    """Train a plain transformer of Phi's shape in a plain loop; if ``compiled``, the first step compiles it."""
    import torch

    from mmphi.benchmarks._minimal_phi import MinimalPhi
    from mmphi.models.device import this_device

    device = this_device()
    model, clock = MinimalPhi.from_hugging_face(build(shape)).to(device), Clock()
    optimizer = torch.optim.AdamW(groups(model), lr=RATE, betas=(0.9, 0.95), fused=True)
    forward: Any = torch.compile(model) if compiled else model
    clock.ends = [time.perf_counter()]
    for step in range(steps):
        ids = torch.tensor(documents(shape, step, kind), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=shape.precision == "bf16"):
            loss = forward(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        clock.step(loss.item())
    return clock


def mmphi_side(shape: Shape, steps: int, kind: str, *, compiled: bool = False) -> Clock:
    """Train as the stage ``pretrain`` does; if ``compiled``, the first step compiles the model."""
    import numpy as np
    import torch
    from torch.utils.data import Dataset

    from mmphi.models.device import this_device
    from mmphi.models.language.causal_lm_task import CausalTask
    from mmphi.models.patches.module_patches import apply_patches, patched
    from mmphi.tracking.tracker import SilentTracker
    from mmphi.training.lm_dataset import pack_row, stack_rows
    from mmphi.training.throughput import StepLoss
    from mmphi.training.trainer import train

    class Steps(Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return steps

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            parts = [np.asarray(ids) for ids in documents(shape, index, kind)]
            # The cost of a mask over one row of all documents would be quadratic in their total length.
            rows = [pack_row([part]) for part in parts] if compiled else [pack_row(parts)]
            return stack_rows(rows, shape.batch_tokens)

    model, clock, losses = apply_patches(build(shape)).to(this_device()), Clock(), StepLoss()

    precision = "bf16" if shape.precision == "bf16" else "fp32"
    settings = own_settings(steps, RATE, batch_size=1, weight_decay=0.1, beta2=0.95, precision=precision)
    with tempfile.TemporaryDirectory() as folder, patched(model, "training"):
        train(
            CausalTask(model, walls="mask", compiled=True) if compiled else CausalTask(model),
            Steps(),
            settings,
            folder=Path(folder),
            tracker=SilentTracker(),
            title="mmphi",
            callbacks=[clock.callback(losses)],
            step_loss=losses,
        )
    return clock
