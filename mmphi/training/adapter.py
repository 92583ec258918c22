"""Training of a low-rank adapter (QLoRA, Dettmers et al. 2023, arXiv 2305.14314) and the projector with it.

The settings are those of :class:`mmphi.config.qlora.QloraSettings`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mmphi.config.qlora import QloraSettings
from mmphi.data.schema import Example
from mmphi.data.tokenized_dataset import TokenizedDataset
from mmphi.evaluation.evaluate import comparison_figure
from mmphi.models.language.adapter import AdapterConfig, adapter_parameters, add_adapter, targets_of
from mmphi.models.multimodal import Multimodal
from mmphi.tracking.tracker import SilentTracker, Tracker
from mmphi.training.callbacks import StepTableCallback
from mmphi.training.conversation_dataset import Choose, conversation_dataset, tokenize_training_rows
from mmphi.training.conversation_validation import ConversationValidation, log_packing
from mmphi.training.optimizers import grouped_adamw
from mmphi.training.trainer import TrainingResult, train
from mmphi.training.training_args import world_rank

BEFORE = "before.json"


def with_new_adapter(model: Multimodal, settings: QloraSettings, tracker: Tracker | None = None) -> Multimodal:
    """Returns the model with a new adapter on its language model; outputs are unchanged until it is trained.

    Args:
        model: Model whose language model has the precision to train in; the result shares its modules.
        settings: Shape of the adapter, and whether the projector is trained.
        tracker: Receives a message with the names of the adapted layers.
    """
    shape = {name: getattr(settings, name) for name in ("rank", "alpha", "rslora", "dropout", "dora", "seed")}
    names = targets_of(model.language.model, tuple(settings.targets))
    language = add_adapter(model.language, AdapterConfig(targets=tuple(names), **shape))
    (tracker or SilentTracker()).say(f"qlora: adapters of rank {settings.rank} on {', '.join(names)}")
    if model.projector is not None:
        model.projector.requires_grad_(settings.projector_learning_rate > 0)
    if model.speech is not None:
        model.speech.requires_grad_(False)
    return model.with_parts(language=language, max_length=settings.max_length, audio_source=None)


def train_adapter(
    model: Multimodal,
    examples: Sequence[Example],
    settings: QloraSettings,
    *,
    tracker: Tracker | None = None,
    folder: Path | None = None,
    sequences: TokenizedDataset | None = None,
    choose: Choose | None = None,
    text_loss: Callable[[], Mapping[str, float]] = dict,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
) -> TrainingResult:
    """Train the adapter of a model, and its projector unless ``projector_learning_rate`` is 0.

    Args:
        model: Made by :func:`with_new_adapter`; changed in place.
        examples: Conversations of all splits; the validation split is used for validation only.
        settings: Steps, batch size, learning rates, ...
        tracker: Receives metrics, tables and messages; by default they are discarded.
        folder: Checkpoint folder, from which a later call resumes; a temporary folder by default.
        sequences: Tokenized training conversations; by default ``examples`` are tokenized.
        choose: Maps the training conversations to the indices to train on; all by default.
        text_loss: Returns figures of forgetting on text; called before and after training.
        callbacks: Additional callbacks of transformers' Trainer.
        progress: Whether progress bars are shown.

    Returns:
        The result; its figures include those of the model before training as ``before/...``.

    Raises:
        DataError: If no training conversation fits in ``max_length``.
        TrainingError: If the loss becomes NaN or infinite.
    """
    tracker = tracker or SilentTracker()
    assert model.projector is not None
    with ExitStack() as stack:
        folder = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mmphi-")))
        log_packing(model, "qlora", tracker)
        if sequences is None:
            sequences = tokenize_training_rows(model, examples, settings.max_length)
        dataset, settings = conversation_dataset(model, sequences, settings, choose=choose)
        adapter = adapter_parameters(model.language)
        figures = {
            "parameters": sum(p.numel() for p in adapter.values()),
            "projector_parameters": sum(p.numel() for p in model.projector.parameters()),
            "supervised_tokens": dataset.supervised(),
        }
        tracker.metrics({f"qlora/{name}": value for name, value in figures.items()})
        validation = ConversationValidation(model, examples, settings, tracker)
        before = _measure_before(folder, validation, text_loss)
        groups = [
            (list(adapter.values()), settings.learning_rate),
            ([p for p in model.projector.parameters() if p.requires_grad], settings.projector_learning_rate),
        ]
        table = StepTableCallback()
        stack.enter_context(model.packed.recomputing(settings.gradient_checkpointing))
        trained = train(
            model.packed,
            dataset,
            settings,
            folder=folder,
            tracker=tracker,
            title="qlora",
            validate=validation or None,
            optimizer=grouped_adamw(
                groups, weight_decay=settings.weight_decay, beta2=settings.beta2, paged=settings.paged
            ),
            callbacks=[table, *callbacks],
            keep_best=settings.checkpoint_selection == "best",
            progress=progress,
        )
    model.packed.eval()
    if world_rank() != 0:
        return replace(trained, figures={})
    if validation and validation.step != trained.result_step:  # The last validation was of other weights, or none ran.
        validation(trained.result_step)
    if table.rows:
        tracker.table("steps", table.rows)
        tracker.figure("training_loss", table.picture())
    if validation:
        both = [{**row, "before": old} for row, old in zip(validation.rows, before["answers"], strict=True)]
        record_before_and_after(both, tracker)
    after = {f"before/{name}": value for name, value in before["figures"].items()}
    return replace(trained, figures={**after, **validation.figures, **text_loss()})


def _measure_before(
    folder: Path, validation: ConversationValidation, text_loss: Callable[[], Mapping[str, float]]
) -> dict[str, Any]:
    """Figures and answers before the first step; a resumed training reads the stored ones."""
    stored = folder / BEFORE
    if world_rank() != 0:
        return {}
    if not stored.exists():
        folder.mkdir(parents=True, exist_ok=True)
        figures = {**(validation(0) if validation else {}), **text_loss()}
        answers = [row["prediction"] for row in validation.rows]
        stored.write_text(json.dumps({"figures": figures, "answers": answers}))
    return dict(json.loads(stored.read_text()))


def record_before_and_after(rows: Sequence[Mapping[str, Any]], tracker: Tracker) -> None:
    """Record answers before and after a training, as a table and as a figure.

    Args:
        rows: Rows with ``image``, ``question``, ``before``, ``prediction`` and ``reference``.
        tracker: The run to record in.
    """
    table = [
        {
            "image": row["image"],
            "question": row["question"],
            "before": row["before"],
            "after": row["prediction"],
            "reference": row["reference"],
        }
        for row in rows
    ]
    tracker.table("before_and_after", table, image="image")
    if table:
        tracker.figure("before_and_after", comparison_figure(table))
