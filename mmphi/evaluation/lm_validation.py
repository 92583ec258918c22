"""Validation of a pretraining: losses on held-out and on public text, and samples."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mmphi.config.pretrain import PretrainSettings
from mmphi.data.token_shards import TokenShards
from mmphi.evaluation.perplexity import PerplexityProtocol
from mmphi.models.language.causal_lm_task import CausalTask
from mmphi.text.packing import to_device
from mmphi.text.prompt import Prompt
from mmphi.tracking.tracker import Tracker
from mmphi.training.fsdp import is_sharded
from mmphi.training.lm_dataset import pack_row, stack_rows

Ids = npt.NDArray[np.int64]
PUBLIC_WINDOW, AT_ONCE = 2048, 4096  # Longest window of the public text, and forward pass, in tokens.
SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 40, 0.8


def validation_windows(tokens: TokenShards, sources: int, context: int, most: int) -> list[Ids]:
    """Return windows of a corpus's held-out text, in a fixed random order.

    Args:
        tokens: Token shards of the corpus.
        sources: Number of its sources.
        context: Longest window, in predicted tokens.
        most: Largest number of predicted tokens in all windows.
    """
    held = np.concatenate([tokens.of(source, validation=True) for source in range(sources)])
    order = np.random.default_rng(0).permutation(held)
    return windows_of((tokens.ids(int(chunk)).astype(np.int64) for chunk in order), context, most)


def windows_of(documents: Iterable[Ids], context: int, most: int) -> list[Ids]:
    """Cut documents into windows of at most ``context`` predicted tokens, up to ``most`` predicted tokens in all."""
    found: list[Ids] = []
    left = most
    for ids in documents:
        for first in range(0, len(ids) - 1, context):
            found.append(ids[first : first + context + 1][: left + 1])
            left -= len(found[-1]) - 1
            if left <= 0:
                return found
    return found


class LMValidation:
    """Computes losses on held-out and on public text, and records samples.

    Args:
        task: Task that is trained.
        held: Held-out windows: token IDs, one more than are predicted.
        prompt: Prompt with the tokenizer.
        chosen: Settings of the public text, its windows and the sample prompts.
        tracker: Run that samples are recorded in; ``None`` records none.
    """

    def __init__(
        self,
        task: CausalTask,
        held: list[Ids],
        prompt: Prompt,
        chosen: PretrainSettings,
        tracker: Tracker | None,
    ) -> None:
        self.task, self.prompt, self.chosen, self.tracker = task, prompt, chosen, tracker
        self.held = held
        self.public = self._public() if self.chosen.eval_text else []
        self._last: tuple[int, dict[str, float]] = (-1, {})

    def _public(self) -> list[Any]:
        """Windows of the public text under the protocol."""
        text = Path(self.chosen.eval_text).read_text(encoding="utf-8")
        ids = np.asarray(self.prompt.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        window = min(PUBLIC_WINDOW, self.chosen.context)
        protocol = PerplexityProtocol(window, window, most_windows=self.chosen.eval_windows)
        return [ids[begin:end] for begin, end, _ in protocol.windows(len(ids))]

    def __call__(self, step: int) -> dict[str, float]:
        """Return the losses at a step, in nats per token and bits per byte; repeated calls for a step are cached."""
        if self._last[0] == step:
            return self._last[1]
        figures = self._loss("val", self.held)
        if self.public:
            figures |= self._loss("public", self.public)
        if self.tracker is not None and self.chosen.prompts and not is_sharded(self.task):
            self._samples(step, self.tracker)  # Not with sharded parameters: `generate` needs all of them.
        self._last = step, figures
        return figures

    def _loss(self, name: str, windows: list[Any]) -> dict[str, float]:
        """Losses with each window as a separate document, of which all but the first token are predicted."""
        device, nats, tokens, size = next(self.task.parameters()).device, 0.0, 0, 0
        each = max(1, AT_ONCE // self.chosen.context)
        with torch.inference_mode():
            for first in range(0, len(windows), each):
                row = pack_row(windows[first : first + each])
                nats += float(self.task(**to_device(stack_rows([row], 1), device)))
                tokens += len(row["targets"])
                size += sum(len(self.prompt.tokenizer.decode(w[1:]).encode()) for w in windows[first : first + each])
        return {f"{name}/loss": nats / tokens, f"{name}/bits_per_byte": nats / math.log(2) / size}

    def _samples(self, step: int, tracker: Tracker) -> None:
        """Record a sampled continuation of each prompt."""
        model, tokenizer = self.task.model, self.prompt.tokenizer
        rows = []
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(0)
            for text in self.chosen.prompts:
                ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]], device=model.device)
                written = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=min(SAMPLE_TOKENS, self.chosen.context - ids.shape[1]),
                    do_sample=True,
                    temperature=SAMPLE_TEMPERATURE,
                    top_k=0,
                    pad_token_id=tokenizer.eos_token_id,
                )
                rows.append({"step": step, "prompt": text, "text": tokenizer.decode(written[0, 1:].tolist())})
        tracker.table("samples", rows)
