"""Transcriber: an ASR model with a cache of transcripts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmphi.config.audio import AudioSettings
from mmphi.data.audio import Recording, read_audio
from mmphi.data.content_hash import content_digest
from mmphi.data.lru_cache import LockedLRUCache
from mmphi.data.schema import AudioRef
from mmphi.errors import ModelError
from mmphi.models.audio.transcript_cache import TranscriptCache
from mmphi.models.audio.transcription import ASRModel, Transcript, transcribe
from mmphi.models.audio.vad import PAD_S, SpeechInterval, detect_speech, merge_intervals
from mmphi.models.audio.whisper_backends import BACKENDS, OpenAIWhisper

KEPT = 4096  # Transcripts kept in memory.


@dataclass(frozen=True)
class Audio:
    """Which Whisper a model uses.

    Attributes:
        settings: Settings of the transcription.
        digest: Digest of the weights that the audio projector was trained with; empty accepts any.
    """

    settings: AudioSettings
    digest: str = ""


class CachedTranscriber:
    """ASR model with a cache: every recording is decoded, passed through VAD and transcribed once per process.

    Args:
        asr_model: The ASR model.
        settings: Settings of the transcription.
        memory: Persistent cache of transcripts of files. Those of recordings given as bytes, such as uploads, are not
            stored there.
    """

    def __init__(self, asr_model: ASRModel, settings: AudioSettings, memory: TranscriptCache | None = None) -> None:
        self.asr_model, self.settings, self.memory = asr_model, settings, memory
        self._cache: LockedLRUCache[Transcript] = LockedLRUCache(KEPT)

    def recording(self, audio: AudioRef) -> Recording:
        """Decode a recording.

        Raises:
            AudioError: If it cannot be decoded or is too long.
        """
        return read_audio(audio.source, max_seconds=self.settings.max_seconds)

    def transcripts(self, recordings: Sequence[AudioRef], check: Callable[[], None] = lambda: None) -> list[Transcript]:
        """Transcripts of recordings, in order.

        Args:
            recordings: Audio files, or their contents.
            check: Called before each batch of windows; an exception it raises ends the transcription.

        Raises:
            AudioError: If one cannot be decoded or is too long.
        """
        keys = [recording_identity(audio) for audio in recordings]
        known = {key: transcript for key in keys if (transcript := self._cache.get(key)) is not None}
        new = {key: audio for key, audio in zip(keys, recordings, strict=True) if key not in known}
        if self.memory is not None and new:
            known |= self.memory.recall(list(new))
        fresh = [(key, audio) for key, audio in new.items() if key not in known]
        chosen = self.settings
        for first in range(0, len(fresh), chosen.batch_size):
            some = fresh[first : first + chosen.batch_size]
            transcripts = transcribe(
                self.asr_model,
                [self.recording(audio) for _, audio in some],
                language=chosen.language,
                prompt=chosen.prompt,
                threshold=chosen.vad_threshold,
                window=chosen.max_chunk_s,
                batch_size=chosen.batch_size,
                check=check,
            )
            known |= {key: what for (key, _), what in zip(some, transcripts, strict=True)}
            if self.memory is not None:
                self.memory.remember({key: known[key] for key, audio in some if not isinstance(audio.source, bytes)})
        for key, transcript in known.items():
            self._cache.put(key, transcript)
        return [known[key] for key in keys]

    def parts(self, recording: Recording) -> list[SpeechInterval]:
        """Windows of a recording that are transcribed at once, without silence."""
        longest = self.settings.max_chunk_s
        spoken = detect_speech(recording, threshold=self.settings.vad_threshold, longest=longest)
        return merge_intervals(spoken, longest, pad=PAD_S, end=recording.seconds)


def recording_identity(audio: AudioRef) -> str:
    """Cache key of a recording: the digest of its content, or the path of a file that does not exist."""
    return content_digest(audio.source)


Once = Callable[[str, str, Callable[[], Any]], Any]


def asr_model_of(settings: AudioSettings, device: torch.device, once: Once) -> ASRModel:
    """ASR model, shared within this process.

    Args:
        settings: Whisper, backend and beam size.
        device: Device of the model.
        once: ``ProcessCache.once``.

    Raises:
        ModelError: If it cannot be loaded.
    """

    def load() -> ASRModel:
        return BACKENDS[settings.backend](settings.whisper, device, settings.beam_size)

    asr_model: ASRModel = once("whisper", f"{settings.backend}/{settings.whisper}/{settings.beam_size}/{device}", load)
    return asr_model


def transcriber_of(settings: AudioSettings, device: torch.device, once: Once) -> CachedTranscriber:
    """Transcriber with its caches, shared within this process.

    Args:
        settings: ASR model and settings of the transcription.
        device: Device of the ASR model.
        once: ``ProcessCache.once``.

    Raises:
        ModelError: If the ASR model cannot be loaded.
    """
    asr_model = asr_model_of(settings, device, once)

    def make() -> CachedTranscriber:
        if isinstance(asr_model, OpenAIWhisper):
            return CachedTranscriber(asr_model, settings, TranscriptCache(asr_model.digest, settings))
        return CachedTranscriber(asr_model, settings)  # faster-whisper has no digest for a persistent cache.

    transcriber: CachedTranscriber = once("ears", f"{settings.model_dump_json()}/{device}", make)
    return transcriber


def openai_whisper_of(transcriber: CachedTranscriber, link: str) -> OpenAIWhisper:
    """The openai-whisper model of a transcriber, for an audio input that needs its logits or encoder frames.

    Raises:
        ModelError: If the transcriber uses another backend.
    """
    if not isinstance(transcriber.asr_model, OpenAIWhisper):
        raise ModelError(
            f"faster-whisper does not provide the outputs that the audio input {link} needs",
            "set audio.backend to openai",
        )
    return transcriber.asr_model
