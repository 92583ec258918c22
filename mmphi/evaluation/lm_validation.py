"""How a pretraining stands: losses on what was held out and on a public text, and what the model writes."""

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
PUBLIC_WINDOW, AT_ONCE = 2048, 4096  # Tokens.
SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 40, 0.8


def validation_windows(tokens: TokenShards, sources: int, context: int, most: int) -> list[Ids]:
    """Windows of what was held out of a corpus, in a fixed order.

    Args:
        tokens: Of the corpus.
        sources: How many it has.
        context: Longest window, in predictions.
        most: Predictions in all.
    """
    held = np.concatenate([tokens.of(source, validation=True) for source in range(sources)])
    order = np.random.default_rng(0).permutation(held)
    return windows_of((tokens.ids(int(stretch)).astype(np.int64) for stretch in order), context, most)


def windows_of(documents: Iterable[Ids], context: int, most: int) -> list[Ids]:
    """Documents cut into windows, up to so many predictions in all."""
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
    """Losses on what was held out and on a public text, and samples.

    Args:
        task: What is trained.
        held: What was held out: ids of each window, one more than are predicted.
        prompt: With the tokenizer.
        chosen: What is scored, and how much of it.
        tracker: Where samples go; ``None`` writes none.
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
        """Windows of the public text, as the protocol has them."""
        text = Path(self.chosen.eval_text).read_text(encoding="utf-8")
        ids = np.asarray(self.prompt.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        window = min(PUBLIC_WINDOW, self.chosen.context)
        protocol = PerplexityProtocol(window, window, most_windows=self.chosen.eval_windows)
        return [ids[begin:end] for begin, end, _ in protocol.windows(len(ids))]

    def __call__(self, step: int) -> dict[str, float]:
        """The losses at a step, in nats per token and bits per byte."""
        if self._last[0] == step:
            return self._last[1]
        figures = self._loss("val", self.held)
        if self.public:
            figures |= self._loss("public", self.public)
        if self.tracker is not None and self.chosen.prompts and not is_sharded(self.task):
            self._samples(step, self.tracker)  # Parts of a spread model cannot be asked one by one.
        self._last = step, figures
        return figures

    def _loss(self, name: str, windows: list[Any]) -> dict[str, float]:
        """Each window a document of its own, of which all but the first token is predicted."""
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
        """What the model writes on from each prompt."""
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
