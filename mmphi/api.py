"""Library interface: join a model from components, train it and query it in memory.

Nothing here reads presets, writes files or opens a tracking store unless requested.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mmphi.config.former_names import FORMER_NAMES
from mmphi.config.messages import did_you_mean, explain_validation_error, warn_renamed
from mmphi.config.projector import KIND_SETTINGS, ProjectorSettings
from mmphi.config.qlora import QloraSettings
from mmphi.config.shared import ConversationSettings, LanguageSettings, VisionSettings
from mmphi.data.features import CachedFeatures, ImageFeatures
from mmphi.data.in_memory import examples_of, image_reference
from mmphi.data.llava_row_types import caption_question
from mmphi.data.phrasing import typical_questions
from mmphi.data.schema import Example
from mmphi.data.tokenized_dataset import TokenizedDataset
from mmphi.errors import DataError, ModelError, SettingsError, Stopped, TrainingError
from mmphi.models.device import this_device
from mmphi.models.language.language_model import LanguageModel, load_language_model, wrap_language_model
from mmphi.models.multimodal import Multimodal
from mmphi.models.projector import Projector
from mmphi.models.vision.custom_encoder import TIMM, CustomEncoder, timm_encoder
from mmphi.models.vision.vision_encoder import VisionReference, load_vision_encoder
from mmphi.tracking.tracker import SilentTracker, Tracker

if TYPE_CHECKING:  # Training and evaluation are imported when they are used: answering needs neither.
    from transformers import TrainerCallback

    from mmphi.training.trainer import TrainingResult

S = TypeVar("S", bound=ConversationSettings)
Metrics = Callable[[Mapping[str, float], int], None]
SHAPE = (*("kind", *KIND_SETTINGS, "layers", "width", "parameters", "activation", "norm", "dropout", "standardize"),)


class Model(Multimodal):
    """A language model with image input, created by :func:`join` or :func:`mmphi.load`."""

    _settings: ProjectorSettings | None = None  # Settings of a projector that is not trained yet.
    _fits = 0  # Number of trainings of this object.

    def fit(
        self,
        data: Iterable[Any],
        *,
        validation: Iterable[Any] = (),
        adapter: bool = False,
        logger: str | Metrics | Tracker | None = None,
        folder: str | Path | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        progress: bool = True,
        **settings: Any,
    ) -> TrainingResult:
        """Train the projector, or the projector with an adapter; the weights of the language model are frozen.

        Args:
            data: Conversations in a form of :func:`mmphi.data.in_memory.examples_of`: ``(image, text)``,
                ``(image, question, answer)``, or rows with ``messages`` or ``conversations``.
            validation: Conversations for validation, every ``eval_every`` steps.
            adapter: Whether to add a low-rank adapter (LoRA) to the language model, and train it.
            logger: ``"mlflow"`` for the active run of MLflow, a function of metrics and step, or a
                :class:`~mmphi.tracking.tracker.Tracker`; by default, nothing is recorded.
            folder: Folder for checkpoints, from which an interrupted training resumes.
            callbacks: Callbacks of transformers' Trainer.
            progress: Whether to show progress bars.
            **settings: Settings of the training, with their names in ``mmphi projector --help`` (``mmphi qlora --help``
                for an adapter): ``steps``, ``batch_size``, ``learning_rate``, ...

        Raises:
            ModelError: If the model has no image input, or has an adapter already.
            SettingsError: If a setting does not exist, or its value is out of bounds.
            DataError: If a row cannot be used, or no training data is left.
            TrainingError: If the loss becomes NaN or infinite, or ``folder`` holds another training.
        """
        from mmphi.training.conversation_dataset import training_rows

        if self.features is None or self.projector is None:
            raise ModelError("this model takes no images", "join one with vision=...")
        settings = _current_names("qlora" if adapter else "projector", settings)
        examples = [*examples_of(data), *examples_of(validation, "validation")]
        folder = Path(folder) if folder is not None else None
        common: dict[str, Any] = {"tracker": _tracker(logger), "callbacks": callbacks, "progress": progress}
        common["folder"] = folder
        self._engine = None  # Its caches hold outputs of the projector before training.
        fit = self._fit_adapter if adapter else self._fit_projector
        try:
            trained = fit(examples, settings, common)
        except Stopped as error:
            if folder is None:
                raise Stopped("stopped; nothing was kept, because fit had no folder for checkpoints") from error
            raise
        finally:
            self.packed.eval()
        self._fits += 1
        typical = typical_questions(turn.question for row in training_rows(examples) for turn in row.turns)
        self.questions = tuple(dict.fromkeys([*typical, *self.questions]))
        return trained

    def _fit_projector(
        self, examples: Sequence[Example], settings: Mapping[str, Any], common: Mapping[str, Any]
    ) -> TrainingResult:
        from mmphi.training.conversation_dataset import training_rows
        from mmphi.training.projector import new_projector, train_projector

        assert self.features is not None
        assert self.projector is not None
        shape = {} if self._settings is None else self._settings.model_dump(include=set(SHAPE))
        checked = _checked(ProjectorSettings, "projector", {"max_length": self.max_length, **shape, **settings})
        if self._settings is None and (changed := sorted(set(SHAPE) & set(settings))):
            raise SettingsError(f"{', '.join(changed)}: the projector exists already", "give its shape to join")
        _check_kind(checked, settings)
        self._resume_same(common["folder"], checked, examples)
        if self._settings is not None:  # The new projector is seeded, and standardised on the training images.
            self._use(new_projector(self.language, self.features, checked, examples))
        length = self.max_length
        self._change_length(checked.max_length)
        self.language.model.requires_grad_(False)  # Includes an existing adapter.
        self.projector.requires_grad_(True)
        if self.speech is not None:
            self.speech.requires_grad_(False)
        try:
            trained = train_projector(self, examples, checked, sequences=self._tokenized(examples, checked), **common)
        except BaseException:
            self._change_length(length)
            raise
        self._settings = None
        if self.vision is not None and not self.vision.question:
            self.vision = replace(self.vision, question=caption_question(training_rows(examples)))
        return trained

    def _fit_adapter(
        self, examples: Sequence[Example], settings: Mapping[str, Any], common: Mapping[str, Any]
    ) -> TrainingResult:
        from mmphi.training.adapter import train_adapter, with_new_adapter

        if self.language.adapter is not None:
            raise ModelError("this model has an adapter already", "load the projector's model again")
        if self._settings is not None:
            raise ModelError("the projector is not trained yet", "call fit without adapter first")
        checked = _checked(QloraSettings, "qlora", {"max_length": self.max_length, **settings})
        self._resume_same(common["folder"], checked, examples)
        # Other models may share the language model, so its modules are copied; the copies share the weights.
        model = self.language.model
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        before = self.language, self.packed, self.max_length
        self.language = replace(self.language, model=copy.deepcopy(model, shared))
        try:
            with_adapter = with_new_adapter(self, checked, common["tracker"])
            self.language, self.packed = with_adapter.language, with_adapter.packed
            self._change_length(checked.max_length)
            return train_adapter(self, examples, checked, sequences=self._tokenized(examples, checked), **common)
        except BaseException:
            self.language, self.packed, _ = before
            self._change_length(before[2])
            raise

    def _tokenized(self, examples: Sequence[Example], settings: ConversationSettings) -> TokenizedDataset:
        """Tokenized training conversations; logs a warning with the number of those that are too long."""
        from mmphi.training.conversation_dataset import tokenize_training_rows

        sequences = tokenize_training_rows(self, examples, settings.max_length)
        if sequences.left_out:
            logging.getLogger("mmphi").warning(
                "%d of %d training conversations have more than %d tokens and are left out",
                len(sequences.left_out),
                len(sequences.left_out) + len(sequences.kept),
                settings.max_length,
            )
        return sequences

    def _change_length(self, max_length: int) -> None:
        self.max_length = max_length
        self.packed.layout = self.language.layout(max_length)

    def _resume_same(self, folder: Path | None, settings: ConversationSettings, examples: Sequence[Example]) -> None:
        """Check that a folder does not hold the checkpoints of another training.

        Raises:
            TrainingError: If data, settings or the number of previous trainings of this model differ.
        """
        if folder is None:
            return
        chosen = settings.model_dump(exclude={"save_every", "eval_every", "log_every", "keep_checkpoints", "workers"})
        rows = [(e.id, e.split, [i.id for i in e.images], [(t.question, t.answer) for t in e.turns]) for e in examples]
        whole = json.dumps([self._fits, chosen, rows, self.language.prompt.digest], sort_keys=True, default=str)
        digest, stored = hashlib.sha256(whole.encode()).hexdigest(), folder / "training.json"
        if stored.exists() and json.loads(stored.read_text()).get("digest") != digest:
            raise TrainingError(f"{folder} holds another training: its data or settings differ", "give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        stored.write_text(json.dumps({"digest": digest}))

    def _use(self, projector: nn.Module) -> None:
        device = next(self.language.model.parameters()).device
        own: Any = projector.to(device)
        self.projector = self.packed.projectors["image"] = own

    def ask(self, question: str, *images: Any, audio: Any = (), max_new_tokens: int = 48) -> str:
        """Answer one question by greedy decoding.

        Args:
            question: Question; empty for a caption.
            *images: Paths, bytes, PIL images, arrays, or tensors of pixels.
            audio: Recordings: paths, or the bytes of files.
            max_new_tokens: Maximum length of the answer, in tokens.

        Raises:
            ImageError: If an image cannot be read.
        """
        return super().ask(question, *map(image_reference, images), audio=audio, max_new_tokens=max_new_tokens)

    def evaluate(
        self, data: Iterable[Any], *, logger: str | Metrics | Tracker | None = None, **how: Any
    ) -> dict[str, float]:
        """Returns metrics of the stage ``evaluate`` by name, such as ``test/loss`` in nats per token.

        Args:
            data: Conversations, as in :meth:`fit`.
            logger: As in :meth:`fit`.
            **how: Fields of :class:`~mmphi.evaluation.evaluate.EvaluationConfig`.

        Raises:
            DataError: If a row cannot be used, or there are no rows.
        """
        from mmphi.evaluation.evaluate import EvaluationConfig, evaluate_model

        return evaluate_model(self, examples_of(data, "test"), EvaluationConfig(**how), _tracker(logger))

    def loss(self, data: Iterable[Any]) -> float:
        """Returns the mean loss on the answers of conversations, in nats per token.

        Raises:
            DataError: If no conversation fits in ``max_length`` tokens, or a row cannot be used.
        """
        nats, tokens = self.losses(examples_of(data))
        if not tokens:
            raise DataError(f"no conversation has an answer within {self.max_length} tokens", "raise max_length in fit")
        return nats / tokens

    def image_features(self, *images: Any) -> Tensor:
        """Returns the input features of the projector, float16 (len(images), tokens, width).

        Raises:
            ModelError: If the model has no image input.
        """
        if self.features is None:
            raise ModelError("this model takes no images", "join one with vision=...")
        return self.features.get([image_reference(image) for image in images])


def join(
    language: Any,
    vision: Any,
    *,
    tokenizer: Any = None,
    preprocess: Callable[[Any], Any] | None = None,
    image_size: int = 224,
    projector: nn.Module | None = None,
    prompt: str = "auto",
    precision: str = "fp32",
    max_length: int = 512,
    device: str = "",
    feature_cache_gb: float = 2.0,
    **settings: Any,
) -> Model:
    """Join a vision encoder and a causal language model with a projector, which :meth:`Model.fit` trains.

    Args:
        language: Folder or hub name of a causal language model, or a causal LM of transformers; it is frozen.
        vision: Name or folder of an open_clip model, ``timm/NAME``, a torch module from pixels (N, C, H, W) to features
            (N, T, D), or a source of stored features; it is frozen.
        tokenizer: Tokenizer of a language model object; by default that of its ``name_or_path``.
        preprocess: Function from a PIL image to pixels (C, H, W) for a torch module: a transform or an image processor.
        image_size: Side of the input images in pixels, for a torch module without ``preprocess``.
        projector: A module from features (..., D) to embeddings (..., W), in place of an MLP.
        prompt: ``plain``, ``phi``, ``chat``, or ``auto``, which depends on the tokenizer.
        precision: ``fp32``, ``bf16``, ``8bit`` or ``4bit``, of a language model that is loaded here.
        max_length: Maximum length of a sequence, in tokens; :meth:`Model.fit` may change it.
        device: ``cpu`` or ``cuda:0``, for components that are loaded here; by default the accelerator, if there is one.
        feature_cache_gb: Size of the cache of image features, in GB.
        **settings: Shape of the projector (``kind``, ``merge``, ``queries``, ``layers``, ``width``, ``activation``,
            ``norm``, ``dropout``, ``standardize``), and for an open_clip model ``pretrained``, ``layer``, ``cls`` and
            ``pool``, as in ``mmphi projector --help``.

    Raises:
        ModelError: If a component is missing or does not fit.
        SettingsError: If a setting does not exist.
    """
    from mmphi.training.projector import new_projector

    place = torch.device(device) if device else this_device()
    settings = _current_names("projector", settings)
    shape = {name: settings.pop(name) for name in SHAPE if name in settings}
    spoken = _language(language, tokenizer, prompt, precision, place)
    features, reference = _vision(vision, preprocess, image_size, settings, place, feature_cache_gb)
    chosen = _checked(ProjectorSettings, "projector", {**shape, "max_length": max_length})
    _check_kind(chosen, shape)
    own: Any = projector if projector is not None else new_projector(spoken, features, chosen, ())
    if projector is not None:
        if shape:
            raise SettingsError(f"{', '.join(shape)} cannot be combined with projector=...", "give one of them")
        own = CustomProjector(projector, features.width, spoken.width)
    model = Model(spoken, own, features, max_length, reference)
    model._settings = chosen if projector is None else None
    return model


def _check_kind(settings: ProjectorSettings, given: Mapping[str, Any]) -> None:
    """Check that the kind of projector has the given settings.

    Raises:
        SettingsError: If it lacks one; the message names the kinds that have it.
    """
    from mmphi.models.projector_kinds import KINDS

    for name in KIND_SETTINGS:
        changed = given.get(name) not in (None, ProjectorSettings.model_fields[name].default)
        if changed and name not in KINDS[settings.kind].uses:
            kinds = [f"kind={kind!r}" for kind, layers in KINDS.items() if name in layers.uses]
            raise SettingsError(
                f"{name}: a projector of kind {settings.kind} lacks this setting", f"give {' or '.join(kinds)}"
            )


class CustomProjector(Projector):
    """A user-defined module as a projector; it cannot be saved, because loading could not rebuild it."""

    saveable = False

    def __init__(self, module: nn.Module, input_width: int, output_width: int) -> None:
        from mmphi.models.projector import ProjectorConfig

        super().__init__(ProjectorConfig(input_width, output_width, layers=1))
        self.layers = module
        parameter = next(iter(module.parameters()), torch.zeros(()))
        try:
            found = module.float()(torch.zeros(2, input_width, device=parameter.device))
        except RuntimeError as error:
            raise ModelError(
                f"the projector rejects features of width {input_width}: {error}", "its input width must be theirs"
            ) from error
        if tuple(found.shape) != (2, output_width):
            raise ModelError(
                f"the projector returns {tuple(found.shape)} for features (2, {input_width}), not (2, {output_width})",
                "its output width must be the language model's",
            )

    def scale_output(self, factor: float) -> None:
        """Not supported, because it is unknown which weights of a module scale its outputs.

        Raises:
            ModelError: Always.
        """
        del factor
        raise ModelError(
            "the alignment warm-up scales outputs, which a custom projector does not support", "set alignment_steps=0"
        )


def load(
    folder: Path, *, vision: nn.Module | None = None, preprocess: Callable[[Any], Any] | None = None, **options: Any
) -> Model:
    """Load a stored model.

    Args:
        folder: Folder that ``save_pretrained`` or a stage has written.
        vision: Vision encoder, if :func:`join` was given a module.
        preprocess: Preprocessing of ``vision``.
        **options: Options of :func:`mmphi.models.checkpoint.load_checkpoint`.

    Raises:
        ModelError: If a component is missing, or differs from the stored one.
    """
    from mmphi.models.checkpoint import load_checkpoint, read_description

    stored = read_description(folder).get("vision", {})
    if vision is not None and "encoder" not in stored:
        raise ModelError(f"the model in {folder} has its own vision encoder", "leave vision out")
    if "encoder" in stored and (vision is not None or str(stored["encoder"]).startswith(TIMM)):
        encoder = CustomEncoder(vision, preprocess, stored["encoder"]) if vision else timm_encoder(stored["encoder"])
        encoder.check(stored["encoder"], stored["fingerprint"])
        options["features"] = CachedFeatures(encoder)
    model = load_checkpoint(folder, kind=Model, **options)
    assert isinstance(model, Model)
    return model


def _language(given: Any, tokenizer: Any, prompt: str, precision: str, device: torch.device) -> LanguageModel:
    if isinstance(given, LanguageModel):
        return given
    if isinstance(given, str | Path):
        chosen = _checked(LanguageSettings, "language", {"model": str(given), "prompt": prompt, "precision": precision})
        return load_language_model(chosen, None, device)
    if not hasattr(given, "get_input_embeddings"):
        raise ModelError(
            f"language is a {type(given).__name__}", "give a hub name, a folder, or a causal LM of transformers"
        )
    if tokenizer is None:
        from transformers import AutoTokenizer

        name = str(getattr(given, "name_or_path", ""))
        if not name:
            raise ModelError("the language model comes without a tokenizer", "give tokenizer=...")
        tokenizer = AutoTokenizer.from_pretrained(name)
    return wrap_language_model(given, tokenizer, prompt)


def _vision(
    given: Any,
    preprocess: Callable[[Any], Any] | None,
    image_size: int,
    settings: dict[str, Any],
    device: torch.device,
    gigabytes: float,
) -> tuple[ImageFeatures, VisionReference]:
    if isinstance(given, str | Path) and not str(given).startswith(TIMM):
        unknown = next((name for name in settings if name not in VisionSettings.model_fields), None)
        if unknown is not None and (near := did_you_mean(unknown, [*SHAPE, *VisionSettings.model_fields])):
            raise SettingsError(f"there is no setting {unknown!r}", f"did you mean {near}?")
        chosen = _checked(VisionSettings, "vision", {"model": str(given), **settings})
        encoder = load_vision_encoder(chosen).to(device)
        return CachedFeatures(encoder, gigabytes), VisionReference(chosen, encoder.digest)
    if settings:
        near = did_you_mean(next(iter(settings)), SHAPE)
        hint = f"did you mean {near}?" if near else "help(mmphi.join) lists the settings"
        raise SettingsError(f"there is no setting {next(iter(settings))!r} for this encoder or for the projector", hint)
    if isinstance(given, str | Path):
        custom = timm_encoder(str(given)).to(device)
    elif isinstance(given, nn.Module):
        custom = CustomEncoder(given, preprocess, image_size=image_size)
    elif all(hasattr(given, name) for name in ("get", "tokens", "width", "digest")):
        return given, VisionReference(VisionSettings(), given.digest, encoder=type(given).__name__)
    else:
        raise ModelError(
            f"vision is a {type(given).__name__}", "give the name of an open_clip model, timm/NAME, or a torch module"
        )
    reference = VisionReference(VisionSettings(), custom.digest, encoder=custom.name, fingerprint=custom.fingerprint)
    return CachedFeatures(custom, gigabytes), reference


def _current_names(section: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under their current names.

    Raises:
        SettingsError: If a setting is given under both names.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        current = FORMER_NAMES.get(f"{section}.{name}", f"{section}.{name}").removeprefix(f"{section}.")
        if current != name:
            warn_renamed(f"{section}.{name}", f"{section}.{current}")
        if current in found:
            raise SettingsError(f"{section}.{current} is given twice, as {name} too", "give it once")
        found[current] = value
    return found


def _checked(kind: type[S] | Any, section: str, values: Mapping[str, Any]) -> Any:
    """Validated settings of a section.

    Raises:
        SettingsError: If a setting does not exist, or its value is out of bounds.
    """
    if unknown := [name for name in values if name not in kind.model_fields]:
        near = did_you_mean(unknown[0], kind.model_fields)
        hint = f"did you mean {near}?" if near else f"`mmphi {section} --help-all` lists them"
        raise SettingsError(f"there is no setting {unknown[0]!r}", hint)
    try:
        return kind(**values)
    except ValidationError as error:
        raise explain_validation_error(kind, error) from error


class _MetricsTracker(SilentTracker):
    """Passes metrics to a function and messages to the logger ``mmphi``."""

    def __init__(self, record: Metrics) -> None:
        self.record = record

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.record(values, step)

    def say(self, line: str) -> None:
        logging.getLogger("mmphi").info(line)


def _tracker(logger: str | Metrics | Tracker | None) -> Tracker:
    if logger is None:
        return _MetricsTracker(lambda _values, _step: None)
    if logger == "mlflow":
        import mlflow

        def record(values: Mapping[str, float], step: int) -> None:
            mlflow.log_metrics(dict(values), step=step)

        return _MetricsTracker(record)
    if callable(logger):
        return _MetricsTracker(logger)
    if isinstance(logger, str) or not all(hasattr(logger, name) for name in ("metrics", "table", "figure", "say")):
        raise SettingsError(f"logger is {logger!r}", 'give "mlflow", a function of metrics and step, or a Tracker')
    return logger
