"""Whisper backends with one interface: openai-whisper, and faster-whisper if it is installed."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from mmphi.data.audio import RATE, Samples
from mmphi.errors import PartMissingError
from mmphi.models.audio.transcription import ASRModel, ASRResult, Segment
from mmphi.models.audio.vad import WINDOW_S

# As in Whisper's transcribe.py: repetitive or unlikely texts are decoded again at a higher temperature.
TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
REPEATED, UNLIKELY, SAMPLES_OF = 2.4, -1.0, 5
FRAMES_S = 50  # Encoder frames per second.
FASTER = "pip install faster-whisper"


Method = TypeVar("Method", bound=Callable[..., Any])


def _one_thread_at_a_time(method: Method) -> Method:
    """Serialise calls: openai-whisper keeps its key/value cache on the model while it decodes."""

    @wraps(method)
    def locked(self: OpenAIWhisper, *arguments: Any, **options: Any) -> Any:
        with self.lock:
            return method(self, *arguments, **options)

    return locked  # type: ignore[return-value]  # The wrapper has the wrapped signature.


def stored_whisper(size: str) -> Path | None:
    """Weights of a size in the folder ``MMPHI_MODELS``, ``whisper-SIZE.pt`` or ``SIZE.pt``; ``None`` if missing."""
    folder = os.environ.get("MMPHI_MODELS", "")
    files = (Path(folder).expanduser() / name for name in (f"whisper-{size}.pt", f"{size}.pt"))
    return next((file for file in files if file.is_file()), None) if folder else None


class OpenAIWhisper:
    """openai-whisper: a size by name, or a file of weights.

    Args:
        name: ``tiny.en``, ``base``, ..., or the path of a ``.pt`` file.
        device: Device of the model.
        beam: Beam size; 1 is greedy.

    Raises:
        PartMissingError: If there is no such size, or its weights cannot be loaded.
    """

    lock = threading.RLock()  # Shared by all instances: on one machine they would slow each other down.

    def __init__(self, name: str, device: torch.device, beam: int = 5) -> None:
        import whisper

        sizes = whisper.available_models()
        file = Path(name).expanduser()
        if not file.is_file() and name not in sizes:
            raise PartMissingError(f"there is no Whisper {name!r}", f"give a .pt file, or one of {', '.join(sizes)}")
        if not file.is_file():
            file = stored_whisper(name) or file
        try:
            self.model = whisper.load_model(str(file) if file.is_file() else name, device=device).eval()
        except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
            raise PartMissingError(
                f"Whisper {name} cannot be loaded: {error}",
                "with no network: --whisper FILE.pt (of a stage: --audio.whisper FILE.pt), or put the file into the"
                f" folder of MMPHI_MODELS as whisper-{name}.pt",
            ) from error
        self.name, self.english, self.beam = name, not self.model.is_multilingual, beam
        self.half = device.type == "cuda"

    @property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def mel(self, sounds: Sequence[Samples], seconds: float = WINDOW_S) -> torch.Tensor:
        """Log-mel spectrograms (B, mels, 100 * seconds) of windows, padded or cut to ``seconds``."""
        import whisper

        bands = self.model.dims.n_mels
        made = [
            whisper.log_mel_spectrogram(
                whisper.pad_or_trim(torch.from_numpy(np.ascontiguousarray(s)), round(seconds * RATE)), bands
            )
            for s in sounds
        ]
        return torch.stack(made).to(self.model.device, torch.float16 if self.half else torch.float32)

    @property
    def width(self) -> int:
        """Width of an encoder frame."""
        return int(self.model.dims.n_audio_state)

    @_one_thread_at_a_time
    @torch.no_grad()  # Not inference mode: training on these frames saves them for the backward pass.
    def encode(self, sounds: Sequence[Samples], fill: float = WINDOW_S) -> list[torch.Tensor]:
        """Encoder frames (n, width) of windows, 50 per second of sound, without those of the padding.

        Args:
            sounds: Windows, float32 at 16 kHz, at most 30 s each.
            fill: Windows are padded with silence to a multiple of this, in seconds. Whisper was trained on 30; with 5,
                short sounds take a fraction of the time, and their frames are nearly the same.
        """
        found: dict[int, torch.Tensor] = {}
        places = dict[float, list[int]]()
        for place, sound in enumerate(sounds):
            seconds = min(WINDOW_S, fill * max(1, math.ceil(len(sound) / RATE / fill)))
            places.setdefault(seconds, []).append(place)
        for seconds, own in places.items():
            frames = self._frames(self.mel([sounds[place] for place in own], seconds))
            found.update(zip(own, frames, strict=True))
        return [found[place][: -(-len(sound) * FRAMES_S // RATE)] for place, sound in enumerate(sounds)]

    def _frames(self, mel: torch.Tensor) -> torch.Tensor:
        """Forward pass of Whisper's encoder, for spectrograms of any length up to 30 s."""
        from torch.nn.functional import gelu

        encoder = self.model.encoder
        hidden = gelu(encoder.conv2(gelu(encoder.conv1(mel)))).permute(0, 2, 1)
        hidden = (hidden + encoder.positional_embedding[: hidden.shape[1]]).to(hidden.dtype)
        for block in encoder.blocks:
            hidden = block(hidden)
        frames: torch.Tensor = encoder.ln_post(hidden)
        return frames

    @_one_thread_at_a_time
    @torch.no_grad()
    def posterior(self, sound: Samples, text: str) -> tuple[list[int], torch.Tensor]:
        """Logits over all text tokens at each position of a transcript.

        Args:
            sound: Window, float32 at 16 kHz.
            text: Transcript of the window.

        Returns:
            The n tokens of the transcript, and logits (n, V) over the V text tokens, given the tokens before.
        """
        tokenizer = self._tokenizer("en")
        tokens = list(tokenizer.encode(" " + text.strip())) if text.strip() else []
        start = list(tokenizer.sot_sequence_including_notimestamps)
        given = torch.tensor([start + tokens], device=self.model.device)
        audio = self.model.embed_audio(self.mel([sound]))
        logits = self.model.logits(given, audio)[0].float()
        return tokens, logits[len(start) - 1 : len(start) - 1 + len(tokens), : tokenizer.eot]

    def tokens(self) -> Iterator[tuple[int, bytes]]:
        """Yields every text token ID with its bytes."""
        tokenizer = self._tokenizer("en")
        for token in range(tokenizer.eot):
            yield token, tokenizer.encoding.decode_single_token_bytes(token)

    def _tokenizer(self, language: str) -> Any:
        from whisper.tokenizer import get_tokenizer

        return get_tokenizer(
            self.model.is_multilingual, num_languages=self.model.num_languages, language=language, task="transcribe"
        )

    @_one_thread_at_a_time
    @torch.inference_mode()
    def transcribe(self, sounds: Sequence[Samples], languages: Sequence[str], prompt: str = "") -> list[ASRResult]:
        """Transcribe windows: see :class:`~mmphi.models.audio.transcription.ASRModel`."""
        if not sounds:
            return []
        audio = self.model.embed_audio(self.mel(sounds))
        known = list(languages)
        unknown = [i for i, code in enumerate(known) if not code]
        if unknown:
            _, likely = self.model.detect_language(audio[unknown])
            for i, odds in zip(unknown, likely, strict=True):
                known[i] = max(odds, key=odds.get)
        results: dict[int, Any] = {}
        for code in sorted(set(known)):
            places = [i for i, own in enumerate(known) if own == code]
            results |= dict(zip(places, self._decoded(audio[places], code, prompt), strict=True))
        return [
            ASRResult(self._segments(results[i].tokens, known[i], len(sounds[i]) / RATE), known[i])
            for i in range(len(sounds))
        ]

    def _decoded(self, audio: torch.Tensor, language: str, prompt: str) -> list[Any]:
        """Decoding results; repetitive or unlikely ones are decoded again at higher temperatures."""
        import whisper

        results: list[Any] = [None] * len(audio)
        waiting = list(range(len(audio)))
        with torch.random.fork_rng(devices=[audio.device] if audio.device.type == "cuda" else []):
            torch.manual_seed(0)
            for temperature in TEMPERATURES:
                options = whisper.DecodingOptions(
                    language=language,
                    temperature=temperature,
                    best_of=SAMPLES_OF if temperature else None,
                    beam_size=self.beam if self.beam > 1 and not temperature else None,
                    prompt=prompt or None,
                    fp16=self.half,
                )
                # openai-whisper 20250625 can decode several hypotheses of one window only.
                single = temperature or self.beam > 1
                groups = [[place] for place in waiting] if single else [waiting]
                for places in groups:
                    for place, result in zip(places, whisper.decode(self.model, audio[places], options), strict=True):
                        results[place] = result
                waiting = [i for i in waiting if _doubtful(results[i])]
                if not waiting:
                    break
        return results

    def _segments(self, tokens: Sequence[int], language: str, seconds: float) -> tuple[Segment, ...]:
        """Segments of text between timestamp tokens."""
        tokenizer = self._tokenizer(language)
        found, start, text = [], 0.0, list[int]()
        for token in [*tokens, tokenizer.timestamp_begin + round(seconds / 0.02)]:
            if token < tokenizer.timestamp_begin:
                if token < tokenizer.eot:
                    text.append(token)
                continue
            at = min((token - tokenizer.timestamp_begin) * 0.02, seconds)
            if text:
                found.append(Segment(start, max(start, at), tokenizer.decode(text).strip()))
                text = []
            start = at
        return tuple(segment for segment in found if segment.text)


def _doubtful(result: Any) -> bool:
    return bool(result.compression_ratio > REPEATED or result.avg_logprob < UNLIKELY)


class FasterWhisper:
    """faster-whisper: a size by name, or a folder that CTranslate2 converted.

    Args:
        name: ``tiny.en``, ``base``, ..., or the path of a folder.
        device: Device of the model.
        beam: Beam size; 1 is greedy.

    Raises:
        PartMissingError: If the package is not installed, or the model cannot be loaded.
    """

    def __init__(self, name: str, device: torch.device, beam: int = 5) -> None:
        try:
            from faster_whisper import WhisperModel
        except ImportError as error:
            raise PartMissingError("faster-whisper is not installed", FASTER) from error
        kind = "float16" if device.type == "cuda" else "float32"
        try:
            self.model = WhisperModel(name, device=device.type, compute_type=kind, cpu_threads=torch.get_num_threads())
        except (OSError, RuntimeError, ValueError) as error:
            raise PartMissingError(
                f"faster-whisper {name} cannot be loaded: {error}", "with no network, give the path of its folder"
            ) from error
        self.name, self.english, self.beam = name, not self.model.model.is_multilingual, beam

    def transcribe(self, sounds: Sequence[Samples], languages: Sequence[str], prompt: str = "") -> list[ASRResult]:
        """Transcribe windows: see :class:`~mmphi.models.audio.transcription.ASRModel`."""
        found = []
        for sound, language in zip(sounds, languages, strict=True):
            segments, about = self.model.transcribe(
                np.ascontiguousarray(sound),
                language=language or None,
                beam_size=self.beam,
                temperature=list(TEMPERATURES),
                initial_prompt=prompt or None,
                condition_on_previous_text=False,
                vad_filter=False,
                no_speech_threshold=None,  # VAD has found speech already.
            )
            spoken = tuple(Segment(s.start, s.end, s.text.strip()) for s in segments if s.text.strip())
            found.append(ASRResult(spoken, about.language))
        return found


BACKENDS: dict[str, Callable[[str, torch.device, int], ASRModel]] = {"openai": OpenAIWhisper, "faster": FasterWhisper}
