"""Pretraining on a corpus of any size: rows of documents from memory-mapped shards, until a target is reached."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from mmphi.config.corpus import CorpusSettings
from mmphi.config.pretrain import PretrainSettings
from mmphi.config.textgen import TextgenSettings
from mmphi.pipeline.stage import Context

if TYPE_CHECKING:
    from mmphi.models.language.causal_lm_task import CausalTask
    from mmphi.text.prompt import Prompt
    from mmphi.training.checkpoints import ExtraCheckpointState
    from mmphi.training.pretrain_callback import PretrainCallback
    from mmphi.training.stop_criteria import StopCriteria
    from mmphi.training.throughput import StepLoss, Throughput

MILESTONES = {"7": 7.0, "5": 5.0}
WALLS_TOLERANCE, WALLS_TOLERANCE_ROUNDED = 1e-4, 3e-2  # Nats per token; the other in bf16.


def train_on_texts(ctx: Context) -> tuple[Any, Prompt, dict[str, float]]:
    """Train on the shards of the stage ``tokens``.

    Returns:
        The model, its prompt, and its figures.
    """
    import torch
    from transformers import AutoTokenizer, PhiForCausalLM

    from mmphi.data.token_shards import INDEX
    from mmphi.models.device import this_device
    from mmphi.models.patches.module_patches import apply_patches
    from mmphi.models.patches.varlen_attention import varlen_attention_applied
    from mmphi.text.prompt import Prompt

    chosen = ctx.settings(PretrainSettings)
    shards = ctx.upstream["tokens"].path
    index = json.loads((shards / INDEX).read_text())
    prompt = Prompt(AutoTokenizer.from_pretrained(shards / "tokenizer"), "plain")
    config = shape_of(chosen, index["vocabulary"], index["end"])
    torch.manual_seed(chosen.seed)
    model = apply_patches(PhiForCausalLM(config).to(this_device()))
    with varlen_attention_applied(model):
        model, figures = train_model(ctx, model, prompt, _Shards(ctx, index))
    return model, prompt, figures


def train_on_stream(ctx: Context) -> tuple[Any, Prompt, dict[str, float]]:
    """Train on text while it is being written, with Phi-2's tokenizer.

    Returns:
        The model, its prompt, and its figures.
    """
    import torch
    from transformers import PhiForCausalLM

    from mmphi.models.device import this_device
    from mmphi.models.language.phi import PHI2_VOCABULARY
    from mmphi.models.patches.module_patches import apply_patches
    from mmphi.models.patches.varlen_attention import varlen_attention_applied
    from mmphi.stages.pretrain_stream import GeneratedStream
    from mmphi.text.prompt import Prompt
    from mmphi.text.tokenizer import phi2_tokenizer
    from mmphi.textgen.generator_pool import backend_of

    chosen = ctx.settings(PretrainSettings)
    tokenizer = phi2_tokenizer()
    prompt = Prompt(tokenizer, "plain")
    config = shape_of(chosen, PHI2_VOCABULARY, tokenizer.eos_token_id)
    torch.manual_seed(chosen.seed)
    model = apply_patches(PhiForCausalLM(config).to(this_device()))
    backend = backend_of(ctx.settings(TextgenSettings), ctx.tracker.say)
    with GeneratedStream(ctx, tokenizer, backend) as stream, varlen_attention_applied(model):
        model, figures = train_model(ctx, model, prompt, stream)
        figures |= stream.told(figures["pretrain/seconds"])
    return model, prompt, figures


class TextSource(Protocol):
    """Where a training has its text from."""

    @property
    def beside(self) -> ExtraCheckpointState | None:
        """What of it belongs to a checkpoint."""

    def held(self) -> list[Any]:
        """Windows that are kept apart: ids, one more than are predicted."""

    def steps(self, rows: int, passes: int, steps: int) -> Any:
        """The batches of the training, by index."""


class _Shards:
    """The shards of the stage ``tokens``: a step's number says all that there is to say of where it is."""

    beside = None

    def __init__(self, ctx: Context, index: Mapping[str, Any]) -> None:
        from mmphi.data.token_shards import TokenShards

        self.ctx, self.chosen = ctx, ctx.settings(PretrainSettings)
        self.tokens = TokenShards(ctx.upstream["tokens"].path, index["shards"])
        self.weights = [source.weight for source in ctx.settings(CorpusSettings).sources] or [0.0]

    def held(self) -> list[Any]:
        """See :class:`TextSource`."""
        from mmphi.evaluation.lm_validation import validation_windows

        return validation_windows(self.tokens, len(self.weights), self.chosen.context, self.chosen.validation_tokens)

    def steps(self, rows: int, passes: int, steps: int) -> Any:
        """See :class:`TextSource`."""
        from mmphi.training.lm_dataset import LMDataset

        chosen = self.chosen
        how = {"context": chosen.context, "rows": rows, "passes": passes, "steps": steps, "seed": chosen.seed}
        made = LMDataset(self.tokens, self.weights, **how)
        self.ctx.tracker.metrics({"pretrain/corpus_tokens": made.tokens})
        return made


def train_model(ctx: Context, model: Any, prompt: Prompt, texts: TextSource) -> tuple[Any, dict[str, float]]:
    """Train a model on texts until a target is reached.

    Returns:
        The model, and its figures.
    """
    from mmphi.evaluation.lm_validation import LMValidation, windows_of
    from mmphi.models.language.phi import count_parameters
    from mmphi.models.packed_vlm import PackedVLM
    from mmphi.training.lr_scaling import with_learning_rates
    from mmphi.training.stop_criteria import StopCriteria, parse_stop
    from mmphi.training.throughput import StepLoss, Throughput
    from mmphi.training.trainer import train
    from mmphi.training.training_args import world_size

    chosen, config, say = ctx.settings(PretrainSettings), model.config, ctx.tracker.say
    budget = chosen.supervised_tokens
    parameters, stop = count_parameters(config), StopCriteria(tokens=budget) if budget else parse_stop(chosen.stop)
    say(f"Phi, {chosen.size}: {parameters}")
    settings = chosen.model_copy(update={"steps": stop.most_steps(chosen.batch_tokens, chosen.steps)})
    settings = with_learning_rates(settings, parameters.inner, config.hidden_size, chosen.batch_tokens)
    held = windows_of(texts.held(), chosen.context, chosen.validation_tokens)
    passes = chosen.gradient_accumulation_steps * world_size()
    steps = texts.steps(chosen.batch_tokens // chosen.context, passes, settings.steps)
    task = task_of(model, settings, say)
    recomputing = PackedVLM(model).recomputing(chosen.gradient_checkpointing)
    if chosen.shard and world_size() > 1:
        from mmphi.training.fsdp import shard_parameters

        shard_parameters(task, task.model.model.layers)
    throughput, step_loss = Throughput(), StepLoss()
    progress = progress_of(ctx, settings, config, stop, throughput, step_loss)
    ctx.tracker.metrics({"pretrain/parameters": parameters.total})
    validate = LMValidation(task, held, prompt, chosen, ctx.tracker if ctx.first else None)
    with recomputing:
        trained = train(
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
            beside=texts.beside,
        )
    task.eval()
    say(f"ended after {progress.reason or f'{settings.steps} steps'}")
    figures = {**progress.figures(), **validate(trained.steps)}
    return whole_model(task, config), figures


def progress_of(
    ctx: Context,
    settings: PretrainSettings,
    config: Any,
    stop: StopCriteria,
    throughput: Throughput,
    step_loss: StepLoss,
) -> PretrainCallback:
    """What tells and ends the training; notes what it is measured by."""
    import torch

    from mmphi.models.language.phi import count_parameters, training_flops
    from mmphi.training.peak_flops import peak_flops
    from mmphi.training.pretrain_callback import PretrainCallback

    fastest = peak_flops(settings.peak_tflops, torch.bfloat16 if settings.precision == "bf16" else torch.float32)
    ctx.tracker.tags({"mmphi.peak": fastest.name})
    ctx.tracker.say(f"MFU is the share of {fastest.name}, attention counted")
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
    return PretrainCallback(
        ctx.tracker,
        stop,
        {**MILESTONES, "reference-plus-1": settings.reference + 1},
        step_tokens=settings.batch_tokens,
        vocabulary=config.vocab_size,
        flops=lambda tokens, pairs: training_flops(config, tokens, pairs),
        peak=fastest,
        throughput=throughput,
        step_loss=step_loss,
    )


def shape_of(chosen: PretrainSettings, vocabulary: int, end: int) -> Any:
    """The configuration that the settings name, with the corpus's vocabulary."""
    from mmphi.models.language.phi import phi_config, size_config

    if chosen.size != "custom":
        config = size_config(chosen.size, chosen.context, vocabulary, end)
    else:
        shape = chosen.layers, chosen.width, chosen.heads
        rotary = chosen.partial_rotary_factor
        config = phi_config(*shape, chosen.context, vocabulary, end, tied=chosen.tied, rotary=rotary)
    config.initializer_range = chosen.initializer_range
    return config


def task_of(model: Any, chosen: PretrainSettings, say: Callable[[str], None]) -> CausalTask:
    """What is trained: with the fastest walls between documents that hold here, compiled if asked for and possible."""
    import torch

    from mmphi.models.language.causal_lm_task import CausalTask, isolation_error, smoke_test

    device = next(model.parameters()).device
    rounded = chosen.precision == "bf16"
    task = CausalTask(model)
    with torch.autocast(device.type, torch.bfloat16, enabled=rounded):
        error = isolation_error(task)
    if error > (WALLS_TOLERANCE_ROUNDED if rounded else WALLS_TOLERANCE):
        say(f"attention inside documents does not hold here (off by {error:.2g} nats): masked rows are used instead")
        task = CausalTask(model, walls="mask")
    if not chosen.compile:
        return task
    compiled = CausalTask(model, walls="mask", compiled=True)
    try:
        smoke_test(compiled, chosen.context)
    except Exception as problem:  # Whatever a compiler's tool chain may lack; torch names no common ancestor.
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        say(f"torch.compile does not work here ({lines[0][:120]}): going on without it")
        return task
    return compiled


def whole_model(task: CausalTask, config: Any) -> Any:
    """The model as one process has it, for saving."""
    from transformers import PhiForCausalLM

    from mmphi.training.fsdp import gather_full, is_sharded

    if not is_sharded(task):
        return task.model
    state = gather_full(task.model.state_dict())
    model = PhiForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()
