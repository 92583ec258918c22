"""Ears that know what is said, and models that hear with them: what tests of hearing share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from builders import RandomFeatures, tiny_language
from transformers import PhiConfig, PhiForCausalLM

from mmphi.config import LanguageSettings
from mmphi.config.audio import AudioSettings
from mmphi.data.audio import RATE, Recording, Samples
from mmphi.data.schema import AudioRef, Example, ImageRef, Turn
from mmphi.models.audio.audio_features import EncoderFeatures, TranscriptFeatures
from mmphi.models.audio.audio_projector import AudioProjector, AudioProjectorConfig
from mmphi.models.audio.transcriber import CachedTranscriber
from mmphi.models.audio.transcription import Segment, Transcript
from mmphi.models.audio.vad import SpeechInterval
from mmphi.models.audio.whisper_backends import OpenAIWhisper
from mmphi.models.language.language_model import LanguageModel
from mmphi.models.multimodal import Multimodal
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.text.packing import packs
from mmphi.text.prompt import Prompt
from mmphi.text.tokenizer import phi2_tokenizer

SAID = {"q": "What is shown?", "r": "two of them", "s": "", "d": "a dog"}
CPU = torch.device("cpu")


class Knows(CachedTranscriber):
    """Ears that know what is said, and give silence for the sound of it."""

    def __init__(self, asr_model: Any = None, **settings: Any) -> None:
        super().__init__(asr_model, AudioSettings(**settings))

    def transcripts(self, recordings: Sequence[AudioRef], check: Any = None) -> list[Transcript]:
        return [Transcript((Segment(0, 1, SAID[audio.id]),), "en") for audio in recordings]

    def recording(self, audio: AudioRef) -> Recording:
        return Recording(np.zeros(RATE, np.float32))

    def parts(self, recording: Recording) -> list[SpeechInterval]:
        return [SpeechInterval(0, 1)]


def heard(name: str) -> AudioRef:
    return AudioRef(name, Path(name))


def spoken(question: str, answer: str, *names: str, image: bool = False) -> Example:
    images = (ImageRef("i", Path("i")),) if image else ()
    return Example("1", images, (Turn(question, answer),), "s", audio=tuple(map(heard, names)))


def typed(question: str, answer: str, image: bool = False) -> Example:
    return spoken(question, answer, image=image)


def listening(language: LanguageModel | None = None) -> Multimodal:
    torch.manual_seed(2)
    language = language or tiny_language()
    projector = Projector(ProjectorConfig(RandomFeatures.width, language.width))
    return Multimodal(language, projector, RandomFeatures(), audio_source=TranscriptFeatures(language, Knows()))


@cache
def phi_language() -> LanguageModel:
    """A tiny Phi with Phi-2's own tokenizer."""
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=51200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = PhiForCausalLM(config).requires_grad_(False).eval()
    tokenizer = phi2_tokenizer()
    return LanguageModel(model, tokenizer, Prompt(tokenizer, "phi"), 32, "tiny", "0", LanguageSettings(model="tiny"))


def logits(model: Multimodal, example: Example) -> torch.Tensor:
    sample = model.encode(example)
    assert sample is not None
    (pack,) = packs([sample], model.sources, 4096)
    return model.packed.logits(pack)


class Peaked(OpenAIWhisper):
    """A Whisper of English that is sure of some words, and torn between two for others."""

    english, name = True, "peaked"

    def __init__(self) -> None:
        from whisper.tokenizer import get_tokenizer

        self.own = get_tokenizer(False)

    def _tokenizer(self, language: str) -> Any:
        return self.own

    def posterior(self, sound: Samples, text: str) -> tuple[list[int], torch.Tensor]:
        tokens = self.own.encode(" " + text)
        logits = torch.full((len(tokens), self.own.eot), -30.0)
        for place, token in enumerate(tokens):
            logits[place, token] = 0.0
            logits[place, 100 + place] = -1.0 if place % 2 == 0 else 1.0  # Odd places: another is likelier.
        return tokens, logits


def frames(audio: AudioRef) -> torch.Tensor:
    count = {"q": 21, "r": 8, "s": 0, "d": 13}[audio.id]
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(count)).half()


def seeing_frames(stack: int = 4) -> Multimodal:
    language = tiny_language()
    torch.manual_seed(3)
    speech = AudioProjector(AudioProjectorConfig("encoder", 6 * stack, 32, width=24, stack=stack), scale=0.2)
    return Multimodal(language, None, None, audio_source=EncoderFeatures(frames, 6, stack), speech=speech)
