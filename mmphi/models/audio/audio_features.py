"""How a language model hears: the words of a recording, all that it may be, or the frames of Whisper's encoder."""

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
from mmphi.models.audio.audio_projector import Link, SpeechConfig
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

KEPT_BYTES = 256 * 1024**2  # Of what was computed of recordings, in memory.


class AudioFeatureSource(Protocol):
    """Where the features of recordings come from.

    Attributes:
        link: Which of the three.
    """

    link: Link

    @property
    def width(self) -> int:
        """Width of a feature."""

    def inputs(self, recordings: Sequence[AudioRef], check: Callable[[], None] = ..., /) -> list[SpanContent]:
        """Recordings as a sequence takes them; all that takes long is done here, and ``check`` is called meanwhile."""

    def length(self, reference: Any, /) -> int:
        """How many features a recording has: what stands in its place."""

    def rows(self, references: Sequence[Any], /) -> Tensor:
        """The features of all, one after the other, on the CPU, (P, width)."""


class TranscriptFeatures:
    """The words that Whisper hears, as the language model's own embeddings: a cascade, and no training needed.

    Args:
        language: Whose embeddings.
        transcriber: The ASR model with its cache.
    """

    link: Link = "transcript"

    def __init__(self, language: LanguageModel, transcriber: CachedTranscriber) -> None:
        self.language, self.transcriber = language, transcriber
        self.width = language.width

    def inputs(self, recordings: Sequence[AudioRef], check: Callable[[], None] = lambda: None, /) -> list[SpanContent]:
        """Recordings as a sequence takes them: by what is said."""
        heard = self.transcriber.transcripts(recordings, check)
        return [SpanContent("audio", a, 0, t.text) for a, t in zip(recordings, heard, strict=True)]

    def length(self, reference: TranscriptSpan, /) -> int:
        """Tokens of the words."""
        return len(reference.ids)

    @torch.no_grad()
    def rows(self, references: Sequence[TranscriptSpan], /) -> Tensor:
        """Embeddings of the words, (P, W), in the language model's own precision."""
        return self._embeddings([i for reference in references for i in reference.ids])

    def _embeddings(self, ids: Sequence[int]) -> Tensor:
        embed = self.language.model.get_input_embeddings()
        found: Tensor = embed(torch.tensor(list(ids), dtype=torch.long, device=embed.weight.device)).detach().cpu()
        return found


class SoftTranscriptFeatures(TranscriptFeatures):
    """All words that may have been said: for each token the mean of all embeddings, as likely as Whisper holds them.

    Where Whisper's own likeliest token is not the one that stands in the prompt (a space that the prompt does not
    have, a word that was decoded anew), the embedding is the token's own; so as the temperature goes to 0 this becomes
    the transcript.

    Args:
        language: Whose embeddings; its token ids must be Whisper's.
        transcriber: An openai-whisper for English alone.
        temperature: What Whisper's logits are divided by.
        kept_bytes: Most that is kept of what was computed.

    Raises:
        ModelError: If the token ids differ, or this Whisper does not give its logits.
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
        """Recordings as a sequence takes them: by what is said."""
        found = super().inputs(recordings, check)
        for audio in recordings:
            check()
            self._soft(audio)
        return found

    @torch.no_grad()
    def rows(self, references: Sequence[TranscriptSpan], /) -> Tensor:
        """Mean embeddings, (P, W), in the language model's own precision."""
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
        """Tokens of all windows, their mean embeddings, and whether each is the likeliest in its place."""
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
    """The frames of Whisper's encoder, several laid side by side: how it was said, and no transcript in between.

    Args:
        frames: Frames (n, D) of a recording: stored ones, or :func:`live_encoder_frames`.
        frame_width: D.
        stack: Frames to one feature; the last feature is filled up with zeros.
    """

    link: Link = "encoder"

    def __init__(self, frames: Callable[[AudioRef], Tensor], frame_width: int, stack: int) -> None:
        self.frames, self.stack = frames, stack
        self.width = frame_width * stack

    def inputs(self, recordings: Sequence[AudioRef], check: Callable[[], None] = lambda: None, /) -> list[SpanContent]:
        """Recordings as a sequence takes them: by their length."""
        found = []
        for audio in recordings:
            check()
            found.append(SpanContent("audio", audio, self.length(audio)))
        return found

    def length(self, reference: AudioRef, /) -> int:
        """Features of a recording."""
        return -(-len(self.frames(reference)) // self.stack)

    def rows(self, references: Sequence[AudioRef], /) -> Tensor:
        """Stacked frames, float16, (P, D * stack)."""
        stacked = [torch.zeros(0, self.width, dtype=torch.float16)]
        for reference in references:
            frames = self.frames(reference)
            missing = self.length(reference) * self.stack - len(frames)
            stacked.append(torch.nn.functional.pad(frames, (0, 0, 0, missing)).reshape(-1, self.width))
        return torch.cat(stacked)


def encoder_frames(
    transcriber: CachedTranscriber, whisper: OpenAIWhisper, recordings: Sequence[Recording], batch_size: int = 8
) -> list[Tensor]:
    """Frames of recordings, silence left out and the windows of each one after the other: float16 on the CPU, (n, D).

    Args:
        transcriber: How they are divided into windows.
        whisper: Whose encoder.
        recordings: At 16 kHz.
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
    """Frames as the stage ``listen`` stored them; they are found by the content of the recording."""

    def frames(audio: AudioRef) -> Tensor:
        if isinstance(audio.source, bytes):
            return store.get(recording_identity(audio))
        digests.prepare([audio.source])  # Of a dataset, whose files do not change while it is used.
        return store.get(digests[audio.source] or str(audio.source))

    return frames


def live_encoder_frames(transcriber: CachedTranscriber, kept_bytes: float = KEPT_BYTES) -> Callable[[AudioRef], Tensor]:
    """Frames computed when they are first asked for.

    Args:
        transcriber: An openai-whisper.
        kept_bytes: Most that is kept of them.

    Raises:
        ModelError: If this Whisper does not give its frames.
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
    config: SpeechConfig | None,
    device: torch.device,
    once: Once,
) -> AudioFeatureSource:
    """What a model hears with.

    Args:
        language: Whose words they become.
        audio: Which Whisper.
        config: Of the speech projection; words as they are without one.
        device: Where the Whisper goes.
        once: ``Resources.once``, so that what this process has loaded and heard is shared.

    Raises:
        ModelError: If the Whisper cannot be had, is not the one expected, or does not give what the link needs.
    """
    transcriber = transcriber_of(audio.settings, device, once)
    config = config or SpeechConfig("transcript", language.width, language.width)
    if config.link == "transcript":
        return TranscriptFeatures(language, transcriber)
    if config.link == "soft":
        return SoftTranscriptFeatures(language, transcriber, config.temperature)
    whisper = openai_whisper_of(transcriber, "encoder")
    if audio.digest and whisper.digest != audio.digest:
        raise ModelError(
            f"{whisper.name} is not the Whisper that the model was trained with", "give that one: mmphi.load(whisper=)"
        )
    return EncoderFeatures(live_encoder_frames(transcriber), whisper.width, config.stack)


def _check_ids(language: LanguageModel, whisper: OpenAIWhisper) -> None:
    """Refuse a language model whose token ids are not Whisper's.

    Raises:
        ModelError: Naming the first that differs.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if not whisper.english:
        raise ModelError(
            f"the audio input soft needs a Whisper whose tokens are GPT-2's; {whisper.name} is multilingual and has"
            " other tokens",
            "take tiny.en, base.en, small.en or medium.en, or the audio input transcript",
        )
    letters = bytes_to_unicode()
    for token, spelled in whisper.tokens():
        own = language.tokenizer.convert_ids_to_tokens(token) if token < len(language.tokenizer) else None
        theirs = "".join(letters[byte] for byte in spelled)
        if own != theirs:
            raise ModelError(
                f"the audio input soft needs a language model whose token IDs are Whisper's; token {token} is {own!r}"
                f" for {language.name}, and {theirs!r} to {whisper.name}",
                "take a model with GPT-2's tokenizer, such as Phi-2, or the audio input transcript",
            )
