"""Pretraining on a corpus of any size: rows of documents from memory-mapped shards, until a target is reached."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmphi.pipeline.stage import Context
from mmphi.settings.corpus import CorpusSettings
from mmphi.settings.pretrain import PretrainSettings

if TYPE_CHECKING:
    from mmphi.data.tokens import Tokens
    from mmphi.models.causal import CausalTask
    from mmphi.text.prompt import Prompt
    from mmphi.training.meters import StepLoss, Throughput
    from mmphi.training.progress import Progress
    from mmphi.training.stopping import Stop

MILESTONES = {"7": 7.0, "5": 5.0}
WALLS_TOLERANCE, WALLS_TOLERANCE_ROUNDED = 1e-4, 3e-2  # Nats per token; the other in bf16.
PUBLIC_WINDOW, AT_ONCE = 2048, 4096  # Tokens.
SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 40, 0.8


def train_on_texts(ctx: Context) -> tuple[Any, Prompt, dict[str, float]]:
    """Train on the shards of the stage ``tokens``.

    Returns:
        The model, its prompt, and its figures.
    """
    import torch
    from transformers import AutoTokenizer, PhiForCausalLM

    from mmphi.data.tokens import INDEX
    from mmphi.models.device import this_device
    from mmphi.models.documents import attending_inside_documents
    from mmphi.text.prompt import Prompt

    chosen = ctx.settings(PretrainSettings)
    shards = ctx.upstream["tokens"].path
    index = json.loads((shards / INDEX).read_text())
    prompt = Prompt(AutoTokenizer.from_pretrained(shards / "tokenizer"), "plain")
    config = shape_of(chosen, index["vocabulary"], index["end"])
    torch.manual_seed(chosen.seed)
    model = PhiForCausalLM(config).to(this_device())
    with attending_inside_documents(model):
        model, figures = _train(ctx, model, index, prompt)
    return model, prompt, figures


def _train(ctx: Context, model: Any, index: Mapping[str, Any], prompt: Prompt) -> tuple[Any, dict[str, float]]:
    from mmphi.data.tokens import Tokens
    from mmphi.models.packed import PackedModel
    from mmphi.models.phi import count_parameters
    from mmphi.training.arguments import world_size
    from mmphi.training.meters import StepLoss, Throughput
    from mmphi.training.rates import rated
    from mmphi.training.stopping import parse_stop
    from mmphi.training.text_steps import TextSteps
    from mmphi.training.trainer import train

    chosen, config, say = ctx.settings(PretrainSettings), model.config, ctx.tracker.say
    parameters, stop = count_parameters(config), parse_stop(chosen.stop)
    say(f"Phi, {chosen.size}: {parameters}")
    settings = rated(chosen, parameters.inner, config.hidden_size, chosen.batch_tokens)
    settings = settings.model_copy(update={"steps": stop.most_steps(chosen.batch_tokens, chosen.steps)})
    tokens = Tokens(ctx.upstream["tokens"].path, index["shards"])
    weights = [source.weight for source in ctx.settings(CorpusSettings).sources]
    steps = TextSteps(
        tokens,
        weights,
        context=chosen.context,
        rows=chosen.batch_tokens // chosen.context,
        passes=chosen.accumulation * world_size(),
        steps=settings.steps,
        seed=chosen.seed,
    )
    task = task_of(model, settings, say)
    recomputing = PackedModel(model).recomputing(chosen.gradient_checkpointing)
    if chosen.shard and world_size() > 1:
        from mmphi.training.sharding import shard

        shard(task, task.model.model.layers)
    throughput, step_loss = Throughput(), StepLoss()
    progress = progress_of(ctx, settings, config, stop, throughput, step_loss)
    ctx.tracker.metrics({"pretrain/parameters": parameters.total, "pretrain/corpus_tokens": steps.tokens})
    validate = Validation(ctx, task, tokens, len(weights), prompt)
    with recomputing:
        train(
            task,
            steps,
            settings,
            folder=ctx.folder,
            tracker=ctx.tracker,
            title="pretrain",
            validate=validate,
            state=progress.state,
            callbacks=[progress],
            throughput=throughput,
            step_loss=step_loss,
            ended=lambda: progress.ended,
        )
    task.eval()
    say(f"ended after {progress.reason or f'{settings.steps} steps'}")
    figures = {**progress.figures(), **validate(settings.steps)}
    return whole_model(task, config), figures


def progress_of(
    ctx: Context, settings: PretrainSettings, config: Any, stop: Stop, throughput: Throughput, step_loss: StepLoss
) -> Progress:
    """What tells and ends the training; notes what it is measured by."""
    import torch

    from mmphi.models.phi import count_parameters, training_flops
    from mmphi.training.hardware import peak
    from mmphi.training.progress import Progress

    fastest = peak(settings.peak_tflops, torch.bfloat16 if settings.precision == "bf16" else torch.float32)
    ctx.tracker.tags({"mmphi.peak": fastest.name})
    ctx.tracker.metrics(
        {
            "pretrain/inner_parameters": count_parameters(config).inner,
            "pretrain/learning_rate": settings.learning_rate,
            "pretrain/muon_learning_rate": settings.muon_learning_rate,
            "pretrain/schedule_steps": settings.steps,
            "pretrain/flops_per_token": training_flops(config, 1, 0),
            "pretrain/peak_flops": fastest.flops,
        }
    )
    return Progress(
        ctx.tracker,
        stop,
        {**MILESTONES, "reference+1": settings.reference + 1},
        step_tokens=settings.batch_tokens,
        vocabulary=config.vocab_size,
        flops=lambda tokens, pairs: training_flops(config, tokens, pairs),
        peak=fastest,
        throughput=throughput,
        step_loss=step_loss,
    )


def shape_of(chosen: PretrainSettings, vocabulary: int, end: int) -> Any:
    """The configuration that the settings name, with the corpus's vocabulary."""
    from mmphi.models.phi import phi_config, size_config

    if chosen.size != "custom":
        return size_config(chosen.size, chosen.context, vocabulary, end)
    shape = chosen.layers, chosen.width, chosen.heads
    return phi_config(*shape, chosen.context, vocabulary, end, tied=chosen.tied)


def task_of(model: Any, chosen: PretrainSettings, say: Callable[[str], None]) -> CausalTask:
    """What is trained: with the fastest walls between documents that hold here, compiled if asked for and possible."""
    import torch

    from mmphi.models.causal import CausalTask, try_out, walls_error

    device = next(model.parameters()).device
    rounded = chosen.precision == "bf16"
    task = CausalTask(model)
    with torch.autocast(device.type, torch.bfloat16, enabled=rounded):
        error = walls_error(task)
    if error > (WALLS_TOLERANCE_ROUNDED if rounded else WALLS_TOLERANCE):
        say(f"attention inside documents does not hold here (off by {error:.2g} nats): masked rows are used instead")
        task = CausalTask(model, walls="mask")
    if not chosen.compile:
        return task
    compiled = CausalTask(model, walls="mask", compiled=True)
    try:
        try_out(compiled, chosen.context)
    except Exception as problem:  # Whatever a compiler's tool chain may lack; torch names no common ancestor.
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        say(f"torch.compile does not work here ({lines[0][:120]}): going on without it")
        return task
    return compiled


def whole_model(task: CausalTask, config: Any) -> Any:
    """The model as one process has it, for saving."""
    from transformers import PhiForCausalLM

    from mmphi.training.sharding import is_sharded, whole

    if not is_sharded(task):
        return task.model
    state = whole(task.model.state_dict())
    model = PhiForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


class Validation:
    """Losses on what was kept apart and on a public text, and samples.

    Args:
        ctx: Of the stage.
        task: What is trained.
        tokens: Of the corpus.
        sources: How many it has.
        prompt: With the tokenizer.
    """

    def __init__(self, ctx: Context, task: CausalTask, tokens: Tokens, sources: int, prompt: Prompt) -> None:
        import numpy as np

        self.ctx, self.task, self.prompt = ctx, task, prompt
        self.chosen = ctx.settings(PretrainSettings)
        held = np.concatenate([tokens.of(source, validation=True) for source in range(sources)])
        self.held, left = [], self.chosen.validation_tokens
        for stretch in np.random.default_rng(0).permutation(held):
            ids = tokens.ids(int(stretch)).astype(np.int64)
            for first in range(0, len(ids) - 1, self.chosen.context):
                part = ids[first : first + self.chosen.context + 1]
                self.held.append(part[: left + 1])
                left -= len(self.held[-1]) - 1
                if left <= 0:
                    break
            if left <= 0:
                break
        self.public = self._public() if self.chosen.public_text else []
        self._last: tuple[int, dict[str, float]] = (-1, {})

    def _public(self) -> list[Any]:
        """Windows of the public text, as the protocol has them."""
        import numpy as np

        from mmphi.evaluation.perplexity import Protocol

        text = Path(self.chosen.public_text).read_text(encoding="utf-8")
        ids = np.asarray(self.prompt.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        window = min(PUBLIC_WINDOW, self.chosen.context)
        protocol = Protocol(window, window, most_windows=self.chosen.public_windows)
        return [ids[begin:end] for begin, end, _ in protocol.windows(len(ids))]

    def __call__(self, step: int) -> dict[str, float]:
        """The losses at a step, in nats per token and bits per byte."""
        if self._last[0] == step:
            return self._last[1]
        figures = self._loss("val", self.held)
        if self.public:
            figures |= self._loss("public", self.public)
        if self.ctx.first and self.chosen.prompts and not self._sharded():
            self._samples(step)
        self._last = step, figures
        return figures

    def _sharded(self) -> bool:
        from mmphi.training.sharding import is_sharded

        return is_sharded(self.task)

    def _loss(self, name: str, windows: list[Any]) -> dict[str, float]:
        """Each window a document of its own, of which all but the first token is predicted."""
        import torch

        from mmphi.text.packing import to_device
        from mmphi.training.text_steps import batch_of, row_of

        device, nats, tokens, size = next(self.task.parameters()).device, 0.0, 0, 0
        each = max(1, AT_ONCE // self.chosen.context)
        with torch.inference_mode():
            for first in range(0, len(windows), each):
                row = row_of(windows[first : first + each])
                nats += float(self.task(**to_device(batch_of([row], 1), device)))
                tokens += len(row["targets"])
                size += sum(len(self.prompt.tokenizer.decode(w[1:]).encode()) for w in windows[first : first + each])
        return {f"{name}/loss": nats / tokens, f"{name}/bits_per_byte": nats / math.log(2) / size}

    def _samples(self, step: int) -> None:
        """What the model writes on from each prompt."""
        import torch

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
        self.ctx.tracker.table("samples", rows)
