"""Word error rate, speed and memory of openai-whisper and faster-whisper on the same recordings.

Both transcribe the same windows after the same voice activity detection, with equal beams and fallback rules. The
command prints word error rate, real-time factor and the number of recordings with equal transcripts. Each side runs in
a separate process, so that its peak memory is measured separately.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmphi.benchmarks._process import in_process

SIDES = ("openai", "faster")


def run_side(side: str, model: str, path: Path, limit: int, beam: int = 5) -> dict[str, Any]:
    """Transcripts, word error rate, real-time factor and peak memory of one side.

    Args:
        side: One of :data:`SIDES`.
        model: Size or path of its weights.
        path: CSV of recordings with the header ``audio,transcript``.
        limit: Largest number of recordings; 0 for all.
        beam: Beam size; 1 is greedy.
    """
    from mmphi.data.audio import read_audio
    from mmphi.data.schema import ReadReport
    from mmphi.data.speech_dataset import read_recordings
    from mmphi.evaluation.wer import total_errors, word_errors
    from mmphi.models.audio.transcription import transcribe
    from mmphi.models.audio.whisper_backends import BACKENDS
    from mmphi.models.device import this_device
    from mmphi.training.throughput import peak_memory_bytes

    spoken = list(read_recordings(path, path.parent, ReadReport()))[: limit or None]
    recordings = [read_audio(each.path) for each in spoken]
    asr_model = BACKENDS[side](model, this_device(), beam)
    transcribe(asr_model, recordings[:1])  # Warm-up: loading and compilation are not timed.
    begun = time.perf_counter()
    found = transcribe(asr_model, recordings)
    took = time.perf_counter() - begun
    errors = [word_errors(s.text or "", t.text, t.language) for s, t in zip(spoken, found, strict=True)]
    seconds = sum(each.seconds for each in recordings)
    return {
        "texts": [each.text for each in found],
        "wer": total_errors(errors).rate,
        "words": total_errors(errors).reference_words,
        "seconds": seconds,
        "real_time_factor": took / seconds,
        "memory_gb": peak_memory_bytes() / 1e9,
    }


def main(arguments: Sequence[str]) -> int:
    """Run ``mmphi benchmark transcribe``."""
    parser = argparse.ArgumentParser(prog="mmphi benchmark transcribe", description=__doc__.partition("\n")[0])
    parser.add_argument("--path", type=Path, required=True, help="CSV of recordings (audio,transcript), beside them")
    parser.add_argument("--openai", default="tiny.en", help="size or .pt file for openai-whisper [tiny.en]")
    parser.add_argument("--faster", default="tiny.en", help="size or folder for faster-whisper [tiny.en]")
    parser.add_argument("--limit", type=int, default=0, help="recordings; 0 takes all [0]")
    parser.add_argument("--beam", type=int, default=5, help="guesses followed at once; 1 is greedy [5]")
    parser.add_argument("--rounds", type=int, default=2, help="times that each side runs, in turn [2]")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(list(arguments))
    if options.side:
        model = getattr(options, options.side)
        print(json.dumps(run_side(options.side, model, options.path, options.limit, options.beam)))
        return 0
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            found[side].append(in_process(side, "transcribe", [*arguments, "--side", side]))
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def show(found: Mapping[str, list[dict[str, Any]]]) -> None:
    """Print a table of the sides."""

    def factor(side: str) -> float:
        return float(statistics.median(run["real_time_factor"] for run in found[side]))

    print(f"{'side':8} {'WER':>7} {'real-time factor':>17} {'faster is':>10} {'peak GB':>8}")
    for side, runs in found.items():
        memory = max(run["memory_gb"] for run in runs)
        ratio = f"{factor(side) / factor('faster'):.2f}x"
        print(f"{side:8} {runs[0]['wer']:7.4f} {factor(side):17.4f} {ratio:>10} {memory:8.2f}")
    pairs = list(zip(*(runs[0]["texts"] for runs in found.values()), strict=True))
    same = sum(one == other for one, other in pairs)
    print(f"{same} of {len(pairs)} recordings have equal transcripts")
