"""Pretraining of a causal language model on packed documents, until a stop condition holds.

The settings are those of :class:`mmphi.config.pretrain.PretrainSettings`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PhiConfig, PhiForCausalLM

from mmphi.config.pretrain import PretrainSettings
from mmphi.data.token_shards import TokenShards
from mmphi.evaluation.lm_validation import LMValidation, validation_windows, windows_of
from mmphi.models.device import this_device
from mmphi.models.language.causal_lm_task import CausalTask, isolation_error, smoke_test
from mmphi.models.language.phi import count_parameters, phi_config, size_config, training_flops
from mmphi.models.packed_vlm import PackedVLM
from mmphi.models.patches.module_patches import apply_patches, patched
from mmphi.text.prompt import Prompt
from mmphi.tracking.tracker import Tracker
from mmphi.training.checkpoints import ExtraCheckpointState
from mmphi.training.fsdp import gather_full, is_sharded, shard_parameters
from mmphi.training.lm_dataset import LMDataset
from mmphi.training.lr_scaling import with_learning_rates
from mmphi.training.peak_flops import peak_flops
from mmphi.training.pretrain_callback import PretrainCallback
from mmphi.training.stop_criteria import StopCriteria, parse_stop
from mmphi.training.throughput import StepLoss, Throughput
from mmphi.training.trainer import train
from mmphi.training.training_args import world_size

MILESTONES = {"7": 7.0, "5": 5.0}
ISOLATION_TOLERANCE, ISOLATION_TOLERANCE_ROUNDED = 1e-4, 3e-2  # Nats per token, in fp32 and in bf16.


class TextSource(Protocol):
    """Source of pretraining text."""

    @property
    def extra_state(self) -> ExtraCheckpointState | None:
        """State for checkpoints; None if the step number determines it."""

    def held(self) -> list[Any]:
        """Returns held-out windows of token IDs, each with one more ID than predictions."""

    def steps(self, rows: int, passes: int, steps: int) -> Any:
        """Returns the training batches: ``rows`` rows and ``passes`` passes per step, at most ``steps`` steps."""


class ShardTexts:
    """Pretraining text from the shards of a corpus.

    Args:
        shards: Token shards with training and held-out documents.
        weights: Weight of each source, in order.
        settings: Context, seed and held-out tokens.
        tracker: Records the tokens of the corpus.
    """

    extra_state = None  # The number of a step determines which windows it has.

    def __init__(
        self, shards: TokenShards, weights: Sequence[float], settings: PretrainSettings, tracker: Tracker
    ) -> None:
        self.shards, self.weights, self.settings, self.tracker = shards, list(weights), settings, tracker

    def held(self) -> list[Any]:
        """See :class:`TextSource`."""
        chosen = self.settings
        return validation_windows(self.shards, len(self.weights), chosen.context, chosen.validation_tokens)

    def steps(self, rows: int, passes: int, steps: int) -> Any:
        """See :class:`TextSource`."""
        how = {"context": self.settings.context, "rows": rows, "passes": passes, "steps": steps}
        dataset = LMDataset(self.shards, self.weights, **how, seed=self.settings.seed)
        self.tracker.metrics({"pretrain/corpus_tokens": dataset.tokens})
        return dataset


def model_config(settings: PretrainSettings, vocabulary: int, end: int) -> PhiConfig:
    """Returns the configuration of the model.

    Args:
        settings: Size, or shape if the size is ``custom``.
        vocabulary: Rows of the embedding.
        end: ID of the end-of-text token.
    """
    if settings.size != "custom":
        config = size_config(settings.size, settings.context, vocabulary, end)
    else:
        shape = settings.layers, settings.width, settings.heads
        rotary = settings.partial_rotary_factor
        config = phi_config(*shape, settings.context, vocabulary, end, tied=settings.tied, rotary=rotary)
    config.initializer_range = settings.initializer_range
    return config


def pretrain(
    settings: PretrainSettings,
    config: PhiConfig,
    prompt: Prompt,
    texts: TextSource,
    *,
    folder: Path,
    tracker: Tracker,
    first: bool = True,
) -> tuple[PhiForCausalLM, dict[str, float]]:
    """Train a causal language model from scratch until a stop condition holds.

    Args:
        settings: Optimisation, budget and stop condition.
        config: Shape of the model.
        prompt: Prompt whose tokenizer is used for validation and samples.
        texts: Source of training and validation text.
        folder: Where checkpoints are written; an interrupted training resumes from the newest.
        tracker: Records metrics, samples and messages.
        first: Whether this process writes samples.

    Returns:
        The model with all its parameters, and its figures.
    """
    torch.manual_seed(settings.seed)
    model = apply_patches(PhiForCausalLM(config).to(this_device()))
    with patched(model, "training"):
        return _train(model, settings, prompt, texts, folder, tracker, first)


def _train(
    model: PhiForCausalLM,
    chosen: PretrainSettings,
    prompt: Prompt,
    texts: TextSource,
    folder: Path,
    tracker: Tracker,
    first: bool,
) -> tuple[PhiForCausalLM, dict[str, float]]:
    config, say = model.config, tracker.say
    budget = chosen.supervised_tokens
    parameters, stop = count_parameters(config), StopCriteria(tokens=budget) if budget else parse_stop(chosen.stop)
    say(f"Phi, {chosen.size}: {parameters}")
    settings = chosen.model_copy(update={"steps": stop.most_steps(chosen.batch_tokens, chosen.steps)})
    settings = with_learning_rates(settings, parameters.inner, config.hidden_size, chosen.batch_tokens)
    held = windows_of(texts.held(), chosen.context, chosen.validation_tokens)
    passes = chosen.gradient_accumulation_steps * world_size()
    steps = texts.steps(chosen.batch_tokens // chosen.context, passes, settings.steps)
    task = _task(model, settings, say)
    recomputing = PackedVLM(model).recomputing(chosen.gradient_checkpointing)
    if chosen.shard and world_size() > 1:
        shard_parameters(task, task.model.model.layers)
    throughput, step_loss = Throughput(), StepLoss()
    progress = _progress(tracker, settings, config, stop, throughput, step_loss)
    tracker.metrics({"pretrain/parameters": parameters.total})
    validate = LMValidation(task, held, prompt, chosen, tracker if first else None)
    with recomputing:
        trained = train(
            task,
            steps,
            settings,
            folder=folder,
            tracker=tracker,
            title="pretrain",
            validate=validate,
            state=progress.state,
            callbacks=[progress],
            throughput=throughput,
            step_loss=step_loss,
            ended=lambda: progress.ended,
            extra_state=texts.extra_state,
        )
    task.eval()
    say(f"ended after {progress.reason or f'{settings.steps} steps'}")
    figures = {**progress.figures(), **validate(trained.steps)}
    return _whole_model(task, config), figures


def _progress(
    tracker: Tracker,
    settings: PretrainSettings,
    config: Any,
    stop: StopCriteria,
    throughput: Throughput,
    step_loss: StepLoss,
) -> PretrainCallback:
    """Returns the callback that logs and ends the training; records the reference of MFU."""
    fastest = peak_flops(settings.peak_tflops, torch.bfloat16 if settings.precision == "bf16" else torch.float32)
    tracker.tags({"mmphi.peak": fastest.name})
    tracker.say(f"MFU is relative to {fastest.name} and includes attention")
    tracker.metrics(
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
        tracker,
        stop,
        {**MILESTONES, "reference-plus-1": settings.reference + 1},
        step_tokens=settings.batch_tokens,
        vocabulary=config.vocab_size,
        flops=lambda tokens, pairs: training_flops(config, tokens, pairs),
        peak=fastest,
        throughput=throughput,
        step_loss=step_loss,
    )


def _task(model: Any, chosen: PretrainSettings, say: Callable[[str], None]) -> CausalTask:
    """Returns the task, with the fastest exact isolation of documents, compiled if requested and possible."""
    device = next(model.parameters()).device
    rounded = chosen.precision == "bf16"
    task = CausalTask(model)
    with torch.autocast(device.type, torch.bfloat16, enabled=rounded):
        error = isolation_error(task)
    if error > (ISOLATION_TOLERANCE_ROUNDED if rounded else ISOLATION_TOLERANCE):
        say(
            f"variable-length attention is not exact here (off by {error:.2g} nats per token): using"
            " masked rows instead"
        )
        task = CausalTask(model, walls="mask")
    if not chosen.compile:
        return task
    compiled = CausalTask(model, walls="mask", compiled=True)
    try:
        smoke_test(compiled, chosen.context)
    except Exception as problem:  # Compiler errors have no common base class in torch.
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        say(f"torch.compile does not work here ({lines[0][:120]}): continuing without it")
        return task
    return compiled


def _whole_model(task: CausalTask, config: PhiConfig) -> PhiForCausalLM:
    """Returns the model with all its parameters in this process, for saving."""
    if not is_sharded(task):
        return task.model
    state = gather_full(task.model.state_dict())
    model = PhiForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()
