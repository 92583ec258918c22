"""Stage ``transcribe``: transcribes recordings with timestamps and computes the word error rate."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmphi.config.audio import AudioSettings
from mmphi.config.declared_view import SettingsView
from mmphi.config.speech import RecordingsSection
from mmphi.errors import AudioError, DataError
from mmphi.pipeline.stage import Context, Stage

if TYPE_CHECKING:
    from mmphi.data.schema import ReadReport
    from mmphi.data.speech_dataset import Utterance
    from mmphi.evaluation.wer import WordErrors

LINES = "transcripts.jsonl"
AT_ONCE = 8  # Recordings per batch; their windows are transcribed together.


class TranscribeSettings(RecordingsSection):
    """Recordings to transcribe."""


def check(settings: SettingsView) -> None:
    """Check that recordings are named.

    Raises:
        SettingsError: If ``transcribe.path`` is empty.
    """
    from mmphi.errors import SettingsError

    if not settings(TranscribeSettings).path:
        raise SettingsError(
            "transcribe.path names no recordings", "give a CSV whose header is audio,transcript: --path recordings.csv"
        )


def run(ctx: Context) -> Mapping[str, float]:
    """Transcribe the recordings that an interrupted run did not finish, then compute the metrics of all."""
    from tqdm.auto import tqdm

    from mmphi.data.schema import ReadReport
    from mmphi.data.speech_dataset import read_recordings
    from mmphi.models.audio.transcriber import asr_model_of
    from mmphi.models.device import this_device

    chosen, given, report = ctx.settings(AudioSettings), ctx.settings(TranscribeSettings), ReadReport()
    path = Path(given.path)
    columns = {"audio_column": given.audio_column, "text_column": given.text_column}
    spoken = list(read_recordings(path, Path(given.recordings or path.parent), report, **columns))
    done = finished_rows(ctx.folder / LINES)
    left = [each for each in spoken if each.name not in done]
    if done and left:
        ctx.tracker.say(f"transcribe: resuming after {len(done)} of {len(spoken)} recordings")
    asr_model = asr_model_of(chosen, this_device(), ctx.resources.once) if left else None
    with (ctx.folder / LINES).open("a") as lines, tqdm(total=len(left), desc="transcribe", unit="recording") as bar:
        for first in range(0, len(left), AT_ONCE):
            for line in transcribe_batch(left[first : first + AT_ONCE], asr_model, chosen, report):
                done[line["audio"]] = line
                lines.write(json.dumps(line) + "\n")
            lines.flush()
            bar.update(len(left[first : first + AT_ONCE]))
    ctx.tracker.table("data_read", list(report.rows()))
    if report.bad_share > given.max_bad_share:
        raise DataError(
            f"{len(report.dropped)} recordings cannot be used\n{report.table()}",
            "fix them, or raise transcribe.max_bad_share",
        )
    return measure_transcripts(ctx, [each for each in spoken if each.name in done], done)


def finished_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of an interrupted run, by recording; a truncated line is removed from the file and transcribed again."""
    found: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return found
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
            found[row["audio"]] = row
        except (ValueError, KeyError, TypeError):
            break
    path.write_text("".join(json.dumps(row) + "\n" for row in found.values()))
    return found


def transcribe_batch(
    batch: Sequence[Utterance], asr_model: Any, chosen: AudioSettings, report: ReadReport
) -> list[dict[str, Any]]:
    """Transcribe a batch of recordings into rows; unreadable ones are counted in the report and left out."""
    from mmphi.data.audio import read_audio
    from mmphi.data.speech_dataset import SOURCE
    from mmphi.models.audio.transcription import transcribe

    given, recordings = [], []
    for each in batch:
        try:
            recordings.append(read_audio(each.path, max_seconds=chosen.max_seconds))
            given.append(each)
        except AudioError as error:
            report.drop_kept(SOURCE, each.name, error.reason)
    begun = time.perf_counter()
    found = transcribe(
        asr_model,
        recordings,
        language=chosen.language,
        prompt=chosen.prompt,
        threshold=chosen.vad_threshold,
        window=chosen.max_chunk_s,
        batch_size=chosen.batch_size,
    )
    took = time.perf_counter() - begun
    seconds_in_all = sum(recording.seconds for recording in recordings)
    return [
        {
            "audio": each.name,
            "text": transcript.text,
            "language": transcript.language,
            "seconds": round(recording.seconds, 3),
            "took": took * recording.seconds / seconds_in_all if seconds_in_all else 0.0,
            "segments": [[round(s.start, 2), round(s.end, 2), s.text] for s in transcript.segments],
            "told": list(transcript.defects),
        }
        for each, recording, transcript in zip(given, recordings, found, strict=True)
    ]


def measure_transcripts(
    ctx: Context, spoken: Sequence[Utterance], done: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """Record a table and an HTML page of all recordings, and return their metrics."""
    from mmphi.evaluation.audio_html import audio_page
    from mmphi.evaluation.wer import total_errors, word_errors

    rows: list[dict[str, Any]] = []
    errors: list[WordErrors] = []
    for each in spoken:
        line = done[each.name]
        row = {"audio": each.name, "seconds": line["seconds"], "heard": line["text"], "language": line["language"]}
        if each.text is not None:
            counted = word_errors(each.text, line["text"], line["language"])
            errors.append(counted)
            row |= {"said": each.text, "wer": round(counted.rate, 4)}
        rows.append(row | {"told": " ".join(line["told"])})
    ctx.tracker.table("transcripts", rows)
    ctx.tracker.text("transcripts.html", audio_page([each.path for each in spoken], rows))
    seconds = sum(line["seconds"] for line in done.values())
    figures = {
        "transcribe/recordings": float(len(rows)),
        "transcribe/seconds": seconds,
        "transcribe/real_time_factor": sum(line["took"] for line in done.values()) / max(seconds, 1e-9),
        "transcribe/silent": float(sum(not line["text"] for line in done.values())),
    }
    if errors:
        all_of = total_errors(errors)
        figures |= {"transcribe/wer": all_of.rate, "transcribe/words": float(all_of.reference_words)}
    return figures


STAGE = Stage(
    name="transcribe",
    version=2,
    help="transcribe recordings, and measure the word error rate",
    reads=("transcribe", "audio"),
    run=run,
    check=check,
)
