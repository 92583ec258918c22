"""Stage ``evaluate``: everything measured of a model, on any data, split and checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from mmphi.config import Section, setting
from mmphi.config.declared_view import SettingsView
from mmphi.config.projector import ProjectorSettings
from mmphi.config.qlora import QloraSettings
from mmphi.config.shared import TrainingSettings
from mmphi.config.speech import SpeechSettings
from mmphi.pipeline.stage import Context, Stage
from mmphi.stages.listen import COLUMNS
from mmphi.stages.shared_models import CONTENT, drop_without_features, read, scenes_if_read, stored_features

KEPT = "save_every", "steps", "keep_checkpoints"
HEARD = (  # What decides which recordings there are, what is asked of them, and which are of the split.
    *("path", "recordings", *(f"{name}_column" for name in COLUMNS)),
    *("question", "validation", "test", "split_seed", "soft_temperature"),
)


class EvaluateSettings(Section):
    """How answers are measured."""

    model: str = setting(
        "", "folder, run or registered name of the model; empty takes that of `stage` with these settings", file="model"
    )
    stage: Literal["projector", "qlora", "merge", "speech"] = setting("projector", "whose model, where none is named")
    split: Literal["train", "validation", "test"] = setting("test", "which images")
    seed: int = setting(0, "seed of samples, questions and shuffles", ge=0)
    max_images: int = setting(200, "at most this many images, or recordings; 0 takes all", unit="images", ge=0)
    max_new_tokens: int = setting(48, "longest answer", unit="tokens", ge=1)
    batch_size: int = setting(32, "answers generated at once", unit="answers", affects_key=False, ge=1)
    checkpoint: str = setting("final", "final, or the step of a kept checkpoint")
    yes_no: int = setting(200, "POPE-style yes/no questions; 0 asks none", unit="questions", ge=0)
    held_out_phrasings: bool = setting(
        True,
        "ask the captions of scenes and the yes/no questions a second time, in phrasings that no training contains",
        legacy_default=False,
    )
    long_answers: int = setting(100, "long answers of each kind (conversation, ...); 0 none", unit="answers", ge=0)
    max_answer_tokens: int = setting(512, "longest of these answers", unit="tokens", ge=1)
    candidates: int = setting(1, "captions sampled, of which the most agreed on is taken; 1 is greedy", ge=1)
    temperature: float = setting(0.5, "of sampled candidates", gt=0)
    links: list[Literal["encoder", "transcript", "soft"]] = setting(
        [], "audio inputs to measure, of a model that takes audio; none takes the one it was trained for"
    )


def upstream(settings: SettingsView) -> tuple[str, ...]:
    """Whose model it is, unless one is named, and the scenes where they are read."""
    chosen = settings(EvaluateSettings)
    own = () if chosen.model else (chosen.stage,)
    return own if chosen.stage == "speech" else (*own, *scenes_if_read(settings))


def stored(settings: SettingsView) -> tuple[str, ...]:
    """Stored features, where the projector was trained on them."""
    chosen = settings(EvaluateSettings)
    if chosen.stage == "speech":
        heard = settings(SpeechSettings)
        return ("listen",) if heard.audio_input == "encoder" and heard.features == "cached" and not chosen.model else ()
    cached = settings(ProjectorSettings).features == "cached"
    return ("embed",) if cached and not chosen.model else ()


def run(ctx: Context) -> Mapping[str, float]:
    """Load, measure, record."""
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
    # An adapter is part of a language model that others in this process may use: of a checkpoint it is loaded apart.
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
    """Measure a model that hears, by every link that is asked for.

    Raises:
        DataError: If no recording is of the split.
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
    for link in chosen.links or [model.audio_source.link]:
        own = with_audio_input(ctx, model, link)
        seen = with_readable_audio(own, split, report)
        if not seen:
            raise DataError(f"no recording of the split {chosen.split} can be heard", "keep some apart: speech.test")
        prefix = f"{chosen.split}/{link}" if chosen.links else chosen.split
        fresh = untranscribed_source(ctx, own.language, own.audio_source.link)
        figures |= measure_speech(own, seen, measures, ctx.tracker, prefix, fresh)
    ctx.tracker.table("data_read", list(report.rows()))
    return figures


def unused(settings: SettingsView) -> tuple[str, ...]:
    """What is of recordings where a model of images is measured, and the other way round."""
    return ("data",) if settings(EvaluateSettings).stage == "speech" else ("speech",)


def check(settings: SettingsView) -> None:
    """A checkpoint that the projector keeps.

    Raises:
        SettingsError: If it keeps none of that step.
    """
    from mmphi.errors import SettingsError

    chosen = settings(EvaluateSettings)
    if chosen.checkpoint == "final" or chosen.model:
        return
    if chosen.stage == "merge":
        raise SettingsError(f"evaluate.checkpoint = {chosen.checkpoint}: a merged model has none", "there is final")
    trained: TrainingSettings = settings(ProjectorSettings)
    if chosen.stage in ("qlora", "speech"):
        trained = settings(QloraSettings) if chosen.stage == "qlora" else settings(SpeechSettings)
    saved = sorted({*range(trained.save_every, trained.steps + 1, trained.save_every), trained.steps})
    kept = [str(step) for step in saved[-trained.keep_checkpoints :]]
    if chosen.checkpoint not in kept:
        raise SettingsError(
            f"evaluate.checkpoint = {chosen.checkpoint}: that step is not kept",
            f"there are {', '.join(['final', *kept])}; keep_checkpoints of its stage keeps more",
        )


def checkpoint_of(folder: Path, step: str) -> Path:
    """The folder of a kept checkpoint.

    Raises:
        ModelError: If that step was not kept; names those that were.
    """
    from mmphi.errors import ModelError
    from mmphi.training.checkpoints import complete_checkpoints, step_of

    kept = {str(step_of(path)): path for path in complete_checkpoints(folder)}
    if step not in kept:
        raise ModelError(
            f"evaluate.checkpoint = {step}: that step was not kept",
            f"there are {', '.join(['final', *kept])}; keep_checkpoints of its stage keeps more",
        )
    return kept[step]


STAGE = Stage(
    name="evaluate",
    version=2,
    help="measure a model on any data, split and checkpoint",
    reads=("evaluate", *CONTENT, "data.sources.N.question", *(f"speech.{name}" for name in HEARD)),
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
