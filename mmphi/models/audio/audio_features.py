"""Audio inputs of a language model: transcripts, token probabilities, or frames of Whisper's encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import Any, Protocol

import torch
from torch import Tensor

from mmphi.data.audio import Recording
from mmphi.data.content_hash import FileDigests
from mmphi.data.lru_cache import LockedLRUCache
from mmphi.data.ragged_features import RaggedStore
from mmphi.data.schema import AudioRef
from mmphi.errors import ModelError
from mmphi.models.audio.audio_projector import AudioProjectorConfig, Link
from mmphi.models.audio.transcriber import (
    Audio,
    CachedTranscriber,
    Once,
    openai_whisper_of,
    recording_identity,
    transcriber_of,
)
from mmphi.models.audio.transcription import cut_samples
from mmphi.models.audio.whisper_backends import OpenAIWhisper
from mmphi.models.language.language_model import LanguageModel
from mmphi.text.tokenized_example import SpanContent, TranscriptSpan

KEPT_BYTES = 256 * 1024**2  # Size limit of the cache of computed features, in memory.


class AudioFeatureSource(Protocol):
    """Source of the features of recordings.

    Attributes:
        link: Audio input: ``transcript``, ``soft`` or ``encoder``.
    """

    link: Link

    @property
    def width(self) -> int:
        """Width of a feature."""

    def inputs(self, recordings: Sequence[AudioRef], check: Callable[[], None] = ..., /) -> list[SpanContent]:
        """Span contents of recordings. All slow steps run here, with calls of ``check`` in between."""

    def length(self, reference: Any, /) -> int:
        """Number of features of a recording, which is the length of its span."""

    def rows(self, references: Sequence[Any], /) -> Tensor:
        """Features of all references, concatenated, on the CPU, (P, width)."""


class TranscriptFeatures:
    """Transcripts as the language model's own embeddings: a cascade that needs no training.

    Args:
        language: Language model that provides the embeddings.
        transcriber: The ASR model with its cache.
    """

    link: Link = "transcript"

    def __init__(self, language: LanguageModel, transcriber: CachedTranscriber) -> None:
        self.language, self.transcriber = language, transcriber
        self.width = language.width

    def inputs(self, recordings: Sequence[AudioRef], check: Callable[[], None] = lambda: None, /) -> list[SpanContent]:
        """Span contents of recordings, with their transcripts."""
        transcripts = self.transcriber.transcripts(recordings, check)
        return [SpanContent("audio", a, 0, t.text) for a, t in zip(recordings, transcripts, strict=True)]

    def length(self, reference: TranscriptSpan, /) -> int:
        """Number of tokens of the transcript."""
        return len(reference.ids)

    @torch.no_grad()
    def rows(self, references: Sequence[TranscriptSpan], /) -> Tensor:
        """Embeddings of the transcripts' tokens, (P, W), in the language model's own precision."""
        return self._embeddings([i for reference in references for i in reference.ids])

    def _embeddings(self, ids: Sequence[int]) -> Tensor:
        embed = self.language.model.get_input_embeddings()
        found: Tensor = embed(torch.tensor(list(ids), dtype=torch.long, device=embed.weight.device)).detach().cpu()
        return found


class SoftTranscriptFeatures(TranscriptFeatures):
    """Transcripts as mean embeddings: for each token, all embeddings weighted by Whisper's token probabilities.

    Where Whisper's likeliest token is not the one in the prompt (a space that the prompt lacks, a word decoded again at
    a higher temperature), the embedding of the prompt's token is used. So the features approach those of ``transcript``
    as the temperature approaches 0.

    Args:
        language: Language model that provides the embeddings; its token IDs must be Whisper's.
        transcriber: Transcriber with an English-only openai-whisper.
        temperature: Softmax temperature of Whisper's logits.
        kept_bytes: Size limit of the cache of mean embeddings, in bytes.

    Raises:
        ModelError: If the token IDs differ, or the Whisper backend does not provide logits.
    """

    link: Link = "soft"

    def __init__(
        self,
        language: LanguageModel,
        transcriber: CachedTranscriber,
        temperature: float = 1.0,
        kept_bytes: float = KEPT_BYTES,
    ) -> None:
        super().__init__(language, transcriber)
        self.whisper, self.temperature = openai_whisper_of(transcriber, "soft"), temperature
        _check_ids(language, self.whisper)
        self._found: LockedLRUCache[tuple[list[int], Tensor, Tensor]] = LockedLRUCache(
            kept_bytes, lambda found: _bytes(found[1])
        )

    def inputs(self, recordings: Sequence[AudioRef], check: Callable[[], None] = lambda: None, /) -> list[SpanContent]:
        """Span contents of recordings, with their transcripts."""
        found = super().inputs(recordings, check)
        for audio in recordings:
            check()
            self._soft(audio)
        return found

    @torch.no_grad()
    def rows(self, references: Sequence[TranscriptSpan], /) -> Tensor:
        """Mean embeddings (P, W), in the language model's own precision."""
        found = super().rows(references)
        place = 0
        for reference in references:
            ids, means, certain = self._soft(reference.of)
            for mine, theirs, count in SequenceMatcher(
                a=list(reference.ids), b=ids, autojunk=False
            ).get_matching_blocks():
                for step in range(count):
                    if certain[theirs + step]:
                        found[place + mine + step] = means[theirs + step]
            place += len(reference.ids)
        return found

    def _soft(self, audio: AudioRef) -> tuple[list[int], Tensor, Tensor]:
        """Tokens of all windows, their mean embeddings, and whether each token is the likeliest at its position."""
        key = recording_identity(audio)
        if (found := self._found.get(key)) is None:
            recording = self.transcriber.recording(audio)
            (transcript,) = self.transcriber.transcripts([audio])
            embed = self.language.model.get_input_embeddings()
            ids: list[int] = []
            means, certain = [torch.zeros(0, self.width)], [torch.zeros(0, dtype=torch.bool)]
            for part in self.transcriber.parts(recording):
                tokens, logits = self.whisper.posterior(
                    cut_samples(recording, part), transcript.between(part.start, part.end)
                )
                ids += tokens
                odds = torch.softmax(logits / self.temperature, dim=-1).to(embed.weight.device)
                table = embed(torch.arange(odds.shape[-1], device=embed.weight.device)).float()
                means.append((odds @ table).cpu())
                certain.append(logits.argmax(dim=-1).cpu() == torch.tensor(tokens, dtype=torch.long))
            found = ids, torch.cat(means), torch.cat(certain)
            self._found.put(key, found)
        return found


class EncoderFeatures:
    """Frames of Whisper's encoder, several concatenated to one feature, without a transcript.

    Args:
        frames: Function from a recording to its frames (n, D), see :func:`live_encoder_frames`.
        frame_width: Width D of a frame.
        stack: Frames per feature; the last feature is padded with zeros.
    """

    link: Link = "encoder"

    def __init__(self, frames: Callable[[AudioRef], Tensor], frame_width: int, stack: int) -> None:
        self.frames, self.stack = frames, stack
        self.width = frame_width * stack

    def inputs(self, recordings: Sequence[AudioRef], check: Callable[[], None] = lambda: None, /) -> list[SpanContent]:
        """Span contents of recordings, with their lengths."""
        found = []
        for audio in recordings:
            check()
            found.append(SpanContent("audio", audio, self.length(audio)))
        return found

    def length(self, reference: AudioRef, /) -> int:
        """Number of features of a recording."""
        return -(-len(self.frames(reference)) // self.stack)

    def rows(self, references: Sequence[AudioRef], /) -> Tensor:
        """Stacked frames of all references, float16, (P, D * stack)."""
        stacked = [torch.zeros(0, self.width, dtype=torch.float16)]
        for reference in references:
            frames = self.frames(reference)
            missing = self.length(reference) * self.stack - len(frames)
            stacked.append(torch.nn.functional.pad(frames, (0, 0, 0, missing)).reshape(-1, self.width))
        return torch.cat(stacked)


def encoder_frames(
    transcriber: CachedTranscriber, whisper: OpenAIWhisper, recordings: Sequence[Recording], batch_size: int = 8
) -> list[Tensor]:
    """Encoder frames of recordings without silence, their windows concatenated: each float16 on the CPU, (n, D).

    Args:
        transcriber: Transcriber that divides recordings into windows.
        whisper: Whisper whose encoder is used.
        recordings: Recordings at 16 kHz.
        batch_size: Windows encoded at once.
    """
    sounds = [
        (place, cut_samples(each, part)) for place, each in enumerate(recordings) for part in transcriber.parts(each)
    ]
    found = [[torch.zeros(0, whisper.width, dtype=torch.float16)] for _ in recordings]
    for first in range(0, len(sounds), batch_size):
        some = sounds[first : first + batch_size]
        for (place, _), frames in zip(
            some, whisper.encode([sound for _, sound in some], transcriber.settings.pad_multiple_s), strict=True
        ):
            found[place].append(frames.half().cpu())
    return [torch.cat(own) for own in found]


def stored_encoder_frames(store: RaggedStore, digests: FileDigests) -> Callable[[AudioRef], Tensor]:
    """Function that returns the frames stored by the stage ``listen``, found by the content of the recording."""

    def frames(audio: AudioRef) -> Tensor:
        if isinstance(audio.source, bytes):
            return store.get(recording_identity(audio))
        digests.prepare([audio.source])  # Files of a dataset do not change during use: hash them once.
        return store.get(digests[audio.source] or str(audio.source))

    return frames


def live_encoder_frames(transcriber: CachedTranscriber, kept_bytes: float = KEPT_BYTES) -> Callable[[AudioRef], Tensor]:
    """Function that computes frames at first use and caches them.

    Args:
        transcriber: Transcriber with an openai-whisper.
        kept_bytes: Size limit of the cache, in bytes.

    Raises:
        ModelError: If the Whisper backend does not provide encoder frames.
    """
    whisper = openai_whisper_of(transcriber, "encoder")
    known: LockedLRUCache[Tensor] = LockedLRUCache(kept_bytes, _bytes)

    def frames(audio: AudioRef) -> Tensor:
        key = recording_identity(audio)
        if (found := known.get(key)) is None:
            (found,) = encoder_frames(transcriber, whisper, [transcriber.recording(audio)])
            known.put(key, found)
        return found

    return frames


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def audio_feature_source(
    language: LanguageModel,
    audio: Audio,
    config: AudioProjectorConfig | None,
    device: torch.device,
    once: Once,
) -> AudioFeatureSource:
    """Source of a model's audio features.

    Args:
        language: Language model that the features are for.
        audio: Whisper settings and expected digest.
        config: Shape of the audio projector; ``None`` takes transcripts.
        device: Device of the ASR model.
        once: ``ProcessCache.once``, to share models and transcripts within this process.

    Raises:
        ModelError: If the Whisper cannot be loaded, is not the expected one, or does not provide what the audio input
            needs.
    """
    transcriber = transcriber_of(audio.settings, device, once)
    config = config or AudioProjectorConfig("transcript", language.width, language.width)
    if config.link == "transcript":
        return TranscriptFeatures(language, transcriber)
    if config.link == "soft":
        return SoftTranscriptFeatures(language, transcriber, config.temperature)
    whisper = openai_whisper_of(transcriber, "encoder")
    if audio.digest and whisper.digest != audio.digest:
        raise ModelError(
            f"{whisper.name} is not the Whisper that the model was trained with",
            "pass its size or weights file: mmphi.load(FOLDER, whisper=NAME)",
        )
    return EncoderFeatures(live_encoder_frames(transcriber), whisper.width, config.stack)


def _check_ids(language: LanguageModel, whisper: OpenAIWhisper) -> None:
    """Check that the language model's token IDs are Whisper's.

    Raises:
        ModelError: If Whisper is multilingual, or with the first token that differs.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if not whisper.english:
        raise ModelError(
            f"the audio input soft needs a Whisper whose tokens are GPT-2's; {whisper.name} is multilingual and has"
            " other tokens",
            "use tiny.en, base.en, small.en or medium.en, or the audio input transcript",
        )
    letters = bytes_to_unicode()
    for token, spelled in whisper.tokens():
        own = language.tokenizer.convert_ids_to_tokens(token) if token < len(language.tokenizer) else None
        theirs = "".join(letters[byte] for byte in spelled)
        if own != theirs:
            raise ModelError(
                f"the audio input soft needs a language model whose token IDs are Whisper's; token {token} is {own!r}"
                f" in {language.name} and {theirs!r} in {whisper.name}",
                "use a model with GPT-2's tokenizer, such as Phi-2, or the audio input transcript",
            )
