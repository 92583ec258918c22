"""Stage ``evaluate``: computes all metrics of a model on any data, split and checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmphi.config.declared_view import SettingsView
from mmphi.config.evaluate import EvaluateSettings
from mmphi.config.projector import ProjectorSettings
from mmphi.config.qlora import QloraSettings
from mmphi.config.shared import TrainingSettings
from mmphi.config.speech import SpeechSettings
from mmphi.pipeline.stage import Context, Stage
from mmphi.stages.listen import COLUMNS
from mmphi.stages.shared_models import CONTENT, drop_without_features, read, scenes_if_read, stored_features

KEPT = "save_every", "steps", "supervised_tokens", "keep_checkpoints"
RECORDING_SETTINGS = (  # Settings of ``speech`` that determine the recordings, the question and the splits.
    *("path", "recordings", *(f"{name}_column" for name in COLUMNS)),
    *("question", "validation", "test", "split_seed", "soft_temperature"),
)


def upstream(settings: SettingsView) -> tuple[str, ...]:
    """The stage whose model is measured, unless ``evaluate.model`` names one, and ``scenes`` if the data uses them."""
    chosen = settings(EvaluateSettings)
    own = () if chosen.model else (chosen.stage,)
    return own if chosen.stage == "speech" else (*own, *scenes_if_read(settings))


def stored(settings: SettingsView) -> tuple[str, ...]:
    """The stage with stored features or frames, if the measured stage was trained on them and no model is named."""
    chosen = settings(EvaluateSettings)
    if chosen.stage == "speech":
        speech = settings(SpeechSettings)
        return (
            ("listen",) if speech.audio_input == "encoder" and speech.features == "cached" and not chosen.model else ()
        )
    cached = settings(ProjectorSettings).features == "cached"
    return ("embed",) if cached and not chosen.model else ()


def run(ctx: Context) -> Mapping[str, float]:
    """Load a model, measure it on a split, and return the metrics."""
    from mmphi.errors import DataError
    from mmphi.evaluation.evaluate import EvaluationConfig, evaluate_model
    from mmphi.models.checkpoint import load_checkpoint, load_without_cache
    from mmphi.training.checkpoints import load_weights

    chosen = ctx.settings(EvaluateSettings)
    folder = ctx.models["evaluate.model"] if chosen.model else ctx.upstream[chosen.stage].path
    if chosen.stage == "speech":
        return evaluate_speech(ctx, folder)
    features = stored_features(ctx) if "embed" in ctx.upstream else None
    earlier = chosen.checkpoint != "final"
    # A checkpoint's adapter would change a cached language model that other models share: load it without the cache.
    model = load_checkpoint(folder, features=features, once=load_without_cache if earlier else ctx.resources.once)
    if earlier:
        load_weights(model.packed, checkpoint_of(folder, chosen.checkpoint))
    examples, report = read(ctx.settings, ctx.upstream)
    split = [e for e in examples if e.split == chosen.split]
    if not split:
        return {}
    if model.features is None:
        raise DataError("the model has no vision encoder, and the data has images", "evaluate a projector's model")
    seen = drop_without_features(split, model.features, report)
    ctx.tracker.table("data_read", list(report.rows()))
    measures = EvaluationConfig(**{name: getattr(chosen, name) for name in EvaluationConfig.__dataclass_fields__})
    return evaluate_model(model, seen, measures, ctx.tracker, prefix=chosen.split)


def evaluate_speech(ctx: Context, folder: Path) -> Mapping[str, float]:
    """Measure a model that takes audio, once per audio input in ``evaluate.audio_inputs``.

    Args:
        ctx: Context of the stage.
        folder: Folder of the model.

    Raises:
        DataError: If the split has no readable recording.
    """
    from mmphi.data.schema import ReadReport
    from mmphi.errors import DataError
    from mmphi.evaluation.speech import SpokenMeasures, measure_speech
    from mmphi.models.checkpoint import load_checkpoint
    from mmphi.stages.speech_data import conversations, untranscribed_source, with_audio_input
    from mmphi.training.audio_conversations import with_readable_audio

    chosen, report = ctx.settings(EvaluateSettings), ReadReport()
    model = load_checkpoint(folder, once=ctx.resources.once)
    model = with_audio_input(ctx, model, "")
    if chosen.checkpoint != "final":
        from mmphi.training.checkpoints import load_weights
        from mmphi.training.distillation import DistillationTask

        load_weights(DistillationTask(model.packed, 1.0, 0.0), checkpoint_of(folder, chosen.checkpoint))
    split = [e for e in conversations(ctx, report) if e.split == chosen.split]
    measures = SpokenMeasures(chosen.max_images, chosen.max_new_tokens, chosen.batch_size, chosen.seed)
    figures: dict[str, float] = {}
    for audio_input in chosen.audio_inputs or [model.audio_source.link]:
        own = with_audio_input(ctx, model, audio_input)
        seen = with_readable_audio(own, split, report)
        if not seen:
            raise DataError(f"the split {chosen.split} has no readable recording", "hold some out: speech.test")
        prefix = f"{chosen.split}/{audio_input}" if chosen.audio_inputs else chosen.split
        fresh = untranscribed_source(ctx, own.language, own.audio_source.link)
        figures |= measure_speech(own, seen, measures, ctx.tracker, prefix, fresh)
    ctx.tracker.table("data_read", list(report.rows()))
    return figures


def unused(settings: SettingsView) -> tuple[str, ...]:
    """``data`` if a model for recordings is measured, else ``speech``."""
    return ("data",) if settings(EvaluateSettings).stage == "speech" else ("speech",)


def check(settings: SettingsView) -> None:
    """Check that the measured stage keeps the requested checkpoint.

    Raises:
        SettingsError: If no checkpoint of that step is kept.
    """
    from mmphi.errors import SettingsError

    chosen = settings(EvaluateSettings)
    if chosen.checkpoint == "final" or chosen.model:
        return
    if chosen.stage == "merge":
        raise SettingsError(f"evaluate.checkpoint = {chosen.checkpoint}: a merged model has none", "use final")
    trained: TrainingSettings = settings(ProjectorSettings)
    if chosen.stage in ("qlora", "speech"):
        trained = settings(QloraSettings) if chosen.stage == "qlora" else settings(SpeechSettings)
    if getattr(trained, "supervised_tokens", 0):
        return  # The budget in tokens decides the number of steps, which only the data tell.
    saved = sorted({*range(trained.save_every, trained.steps + 1, trained.save_every), trained.steps})
    kept = [str(step) for step in saved[-trained.keep_checkpoints :]]
    if chosen.checkpoint not in kept:
        raise SettingsError(
            f"evaluate.checkpoint = {chosen.checkpoint}: that step is not kept",
            f"available: {', '.join(['final', *kept])}; raise keep_checkpoints of its stage to keep more",
        )


def checkpoint_of(folder: Path, step: str) -> Path:
    """The folder of a kept checkpoint.

    Raises:
        ModelError: If that step was not kept; the message lists those that were.
    """
    from mmphi.errors import ModelError
    from mmphi.training.checkpoints import complete_checkpoints, step_of

    kept = {str(step_of(path)): path for path in complete_checkpoints(folder)}
    if step not in kept:
        raise ModelError(
            f"evaluate.checkpoint = {step}: that step was not kept",
            f"available: {', '.join(['final', *kept])}; raise keep_checkpoints of its stage to keep more",
        )
    return kept[step]


STAGE = Stage(
    name="evaluate",
    version=2,
    help="measure a model on any data, split and checkpoint",
    reads=("evaluate", *CONTENT, "data.sources.N.question", *(f"speech.{name}" for name in RECORDING_SETTINGS)),
    run=run,
    upstream=upstream,
    unused=unused,
    requests=(
        "projector.features",
        *(f"{stage}.{name}" for stage in ("projector", "qlora") for name in KEPT),
        "speech",
        "audio",
    ),
    request_upstream=stored,
    check=check,
)
