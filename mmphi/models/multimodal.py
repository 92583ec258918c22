"""Joined model: a causal language model with projectors and features, which accepts images and audio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmphi.data.content_hash import content_digest
from mmphi.data.features import ImageFeatures
from mmphi.data.schema import AudioRef, Example, ImageRef
from mmphi.data.tokenized_dataset import image_inputs, tokenize_example
from mmphi.errors import ModelError
from mmphi.extras import missing_package
from mmphi.generation.batch_generate import BAR_AFTER_S, GeneratedAnswer, batch_generate
from mmphi.generation.chat_mixin import ChatMixin
from mmphi.models.audio.audio_projector import AudioProjector, identity_audio_projector
from mmphi.models.language.language_model import LanguageModel
from mmphi.models.packed_vlm import PackedVLM
from mmphi.models.projector import Projector
from mmphi.text.packing import SpanFeatures, packs, to_device
from mmphi.text.tokenized_example import SpanContent, TokenizedExample, join_spans

if TYPE_CHECKING:
    from mmphi.models.audio.audio_features import AudioFeatureSource
    from mmphi.models.audio.transcriber import Audio
    from mmphi.models.vision.vision_encoder import VisionReference

Shown = ImageRef | Sequence[ImageRef] | None
Question = tuple[Shown, str] | tuple[Shown, str, Sequence[AudioRef]] | tuple[Shown, str, Sequence[AudioRef], str]


@dataclass(frozen=True)
class ProjectedFeatures:
    """Features whose projector changes the number of tokens per image.

    Attributes:
        features: Features before the projector.
        length: Function from an image to its number of tokens after the projector.
    """

    features: ImageFeatures
    length: Callable[[ImageRef], int]

    @property
    def width(self) -> int:
        """Width of a feature."""
        return self.features.width

    def rows(self, images: Sequence[ImageRef], /) -> Tensor:
        """Features of images, concatenated, (N * T, width)."""
        return self.features.rows(images)


class Multimodal(ChatMixin):
    """Images, recordings and text in, text out.

    The language model is not changed permanently, so several models may share one.

    Args:
        language: The language model with its tokenizer and prompt.
        projector: Projector from the image features to the language model; ``None`` without images.
        features: Source of image features.
        max_length: Longest sequence, in tokens.
        vision: Vision encoder of the features; needed to save the model.
        own_language: Whether the language model was trained here, and is saved with this model.
        audio_source: Source of audio features, or a function that creates it at the first recording.
        speech: Audio projector; by default the identity on word embeddings.
        audio: Whisper of the audio projector; needed to save it.
        questions: Most frequent questions in training, recorded for users of the model.

    Raises:
        ModelError: If the projector does not fit the features or the language model.
    """

    def __init__(
        self,
        language: LanguageModel,
        projector: Projector | None,
        features: ImageFeatures | None,
        max_length: int = 512,
        vision: VisionReference | None = None,
        own_language: bool = False,
        audio_source: AudioFeatureSource | Callable[[], AudioFeatureSource] | None = None,
        speech: AudioProjector | None = None,
        audio: Audio | None = None,
        questions: Sequence[str] = (),
    ) -> None:
        if projector is not None:
            if features is not None:
                projector.check_fits(features.width, language.width, features.tokens)
            projector.to(device=next(language.model.parameters()).device)
        self.language, self.features, self.max_length, self.projector = language, features, max_length, projector
        self.vision, self.own_language = vision, own_language
        self._audio_source, self.speech, self.audio = audio_source, speech, audio
        self.questions = tuple(questions)
        projectors: dict[str, torch.nn.Module] = {} if projector is None else {"image": projector}
        if speech is not None:
            if speech.config.output_width != language.width:
                raise ModelError(
                    f"the audio projector was trained for a model of width {speech.config.output_width}, not"
                    f" {language.width}",
                    "train one for this model",
                )
            projectors["audio"] = speech.to(device=next(language.model.parameters()).device)
        layout = language.layout(max_length)
        self.packed = PackedVLM(language.model, layout=layout, **projectors).eval()

    def with_parts(self, **parts: Any) -> Multimodal:
        """Return a model with the same parts, except the given ones.

        Args:
            **parts: New parts, by the name of the constructor's argument.
        """
        names = ("language", "projector", "features", "max_length", "vision", "own_language", "speech", "audio")
        own = {name: getattr(self, name) for name in (*names, "questions")}
        return Multimodal(**{**own, "audio_source": self._audio_source, **parts})

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Multimodal:
        """Load a model from its folder; :func:`mmphi.load` also takes runs and registered models, and shares parts.

        Args:
            folder: Folder written by :meth:`save_pretrained` or a stage.
            **options: Options of :func:`~mmphi.models.checkpoint.load_checkpoint`.
        """
        from mmphi.models.checkpoint import load_checkpoint

        return load_checkpoint(Path(folder), **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model to a folder that :meth:`from_pretrained` loads."""
        from mmphi.models.checkpoint import save_checkpoint

        save_checkpoint(Path(folder), self)

    @property
    def device(self) -> torch.device:
        """Device of the language model."""
        parameter: Tensor = next(self.language.model.parameters())
        return parameter.device

    @property
    def sources(self) -> dict[str, SpanFeatures]:
        """Sources of the features of each kind of span."""
        own: dict[str, SpanFeatures] = {}
        if self.features is not None:
            reduces = self.projector is not None and self.projector.config.kind != "mlp"
            own["image"] = ProjectedFeatures(self.features, self.length) if reduces else self.features
        if self._audio_source is not None and not callable(self._audio_source):
            own["audio"] = self._audio_source
        return own

    @property
    def audio_source(self) -> AudioFeatureSource:
        """Source of audio features, created at first use.

        Raises:
            ModelError: If the model has no audio input, a package is missing, or the audio projector does not fit.
        """
        if callable(self._audio_source):
            try:
                self._audio_source = self._audio_source()
            except ModuleNotFoundError as error:
                install = missing_package(error)
                if not install:
                    raise
                raise ModelError(
                    f"audio input needs the package {error.name}, which is not installed", install
                ) from error
        if self._audio_source is None:
            raise ModelError("this model has no audio input", "pass audio_source to Multimodal")
        if self.speech is None:
            self.speech = identity_audio_projector(self.language.width, self._audio_source.link).to(self.device)
            self.packed.projectors["audio"] = self.speech.eval()
        if self.speech.config.input_width != self._audio_source.width:
            raise ModelError(
                f"the audio projector needs features of width {self.speech.config.input_width}, this Whisper has width"
                f" {self._audio_source.width}",
                "use the Whisper that it was trained with",
            )
        return self._audio_source

    def inputs(self, recordings: Sequence[AudioRef], check: Callable[[], None] = lambda: None) -> list[SpanContent]:
        """Span contents of recordings.

        Args:
            recordings: Recordings in order.
            check: Called repeatedly during the computation; an exception it raises ends it.

        Raises:
            ModelError: If there are recordings and the model has no audio input.
        """
        return self.audio_source.inputs(recordings, check) if recordings else []

    def length(self, image: ImageRef) -> int:
        """Number of tokens that an image takes in a prompt."""
        if self.features is None:
            return 0
        count = self.features.length(image)
        return count if self.projector is None else self.projector.output_tokens(count)

    def encode(self, example: Example) -> TokenizedExample | None:
        """Tokenized conversation; ``None`` if it does not fit in ``max_length`` tokens."""
        return tokenize_example(example, self.language.prompt, self.length, self.max_length, self.inputs)

    @torch.inference_mode()
    def losses(
        self, examples: Sequence[Example], images: Sequence[tuple[ImageRef, ...]] | None = None, max_tokens: int = 4096
    ) -> tuple[float, int]:
        """Loss on the answers of conversations.

        Args:
            examples: Conversations; those that do not fit in ``max_length`` are skipped.
            images: Images that replace those of each example; as many.
            max_tokens: Tokens per forward pass.

        Returns:
            Summed loss in nats, and the number of supervised tokens.
        """
        if images is not None:
            examples = [replace(e, images=other) for e, other in zip(examples, images, strict=True)]
        samples = (self.encode(e) for e in examples)
        nats, tokens = 0.0, 0
        kept = [s for s in samples if s is not None]
        made = packs(kept, self.sources, max_tokens, layout=self.packed.layout)
        for pack in tqdm(made, "losses", unit="pack", leave=False, delay=BAR_AFTER_S):
            nats += float(self.packed(**to_device(pack, self.device)))
            tokens += len(pack["targets"])
        return nats, tokens

    def ask(
        self,
        question: str,
        *images: Path | str | ImageRef,
        audio: Path | str | bytes | Sequence[Path | str | bytes] = (),
        max_new_tokens: int = 48,
    ) -> str:
        """Answer one question with greedy decoding.

        Args:
            question: Question; empty for a caption, or if the recording contains it.
            *images: Image files, or references to images in memory.
            audio: One or several recordings: files of any format, or their contents. They are inserted at ``<audio>``
                in the question, else before it; they replace an empty question.
            max_new_tokens: Longest answer, in tokens.

        Raises:
            AudioError: If a recording cannot be decoded.
        """
        references = [image if isinstance(image, ImageRef) else ImageRef(str(image), Path(image)) for image in images]
        given = [audio] if isinstance(audio, Path | str | bytes) else list(audio)
        spoken = [
            AudioRef(content_digest(each), each) if isinstance(each, bytes) else AudioRef(str(each), Path(each))
            for each in given
        ]
        return self.generate([(references, question, spoken)], max_new_tokens)[0].text

    def generate(
        self, prompts: Sequence[Question], max_new_tokens: int = 48, batch_size: int = 32
    ) -> list[GeneratedAnswer]:
        """Answer questions with greedy decoding.

        Args:
            prompts: One, several or no images, a question (empty for a caption), and optionally recordings and a
                context text.
            max_new_tokens: Longest answer, in tokens.
            batch_size: Answers generated at once; it does not change them.

        Returns:
            One answer per prompt, in order.
        """
        samples = [self.open_prompt(*prompt) for prompt in prompts]
        answers = batch_generate(self, samples, batch_size, max_new_tokens=max_new_tokens, do_sample=False)
        return [answer for (answer,) in answers]

    def sample(
        self,
        prompts: Sequence[Question],
        count: int,
        temperature: float,
        max_new_tokens: int = 48,
        batch_size: int = 32,
        seed: int = 0,
    ) -> list[list[GeneratedAnswer]]:
        """Sample several answers to each question.

        Args:
            prompts: One, several or no images, a question (empty for a caption), and optionally recordings and a
                context text.
            count: Answers per question.
            temperature: Softmax temperature; near 0 all answers are the greedy one.
            max_new_tokens: Longest answer, in tokens.
            batch_size: Answers generated at once.
            seed: Equal seeds and batch sizes give equal answers; the caller's random state does not change.

        Returns:
            ``count`` answers per prompt, in order.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            return batch_generate(
                self,
                [self.open_prompt(*prompt) for prompt in prompts],
                max(1, batch_size // count),
                max_new_tokens=max_new_tokens,
                do_sample=True,
                num_return_sequences=count,
                temperature=temperature,
                top_k=0,  # Sample from the full distribution, whatever the model's generation config.
                top_p=1.0,
            )

    def question_or_default(self, question: str, images: Sequence[ImageRef], audio: Sequence[AudioRef]) -> str:
        """The question; for images alone, the question of captions in training."""
        if question or audio or not images or self.vision is None:
            return question
        return self.vision.question

    def open_prompt(
        self, images: Shown, question: str, audio: Sequence[AudioRef] = (), context: str = ""
    ) -> TokenizedExample:
        """Tokenized prompt that ends where the answer begins."""
        shown = [images] if isinstance(images, ImageRef) else list(images or ())
        audio_inputs = self.inputs(audio)
        transcripts = [each.transcript for each in audio_inputs]
        question = self.question_or_default(question, shown, audio)
        parts = self.language.prompt.parts([(question, None)], images=len(shown), context=context, audio=transcripts)
        return join_spans(parts, [*image_inputs(shown, self.length), *audio_inputs], question)
