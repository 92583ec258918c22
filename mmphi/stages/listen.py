"""Stage ``listen``: computes the Whisper encoder frames of every recording once and stores them.

As in the stage ``embed``, the key depends only on the Whisper model and its settings, not on the recordings. If a
result lacks requested recordings, the next run takes its frames over and computes the missing ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmphi.config import Section, setting
from mmphi.config.audio import AudioSettings
from mmphi.config.declared_view import SettingsView
from mmphi.config.speech import SpeechSettings
from mmphi.errors import AudioError, DataError
from mmphi.pipeline.stage import Context, Result, Stage

if TYPE_CHECKING:
    from mmphi.data.schema import ReadReport
    from mmphi.data.speech_dataset import Utterance

COLUMNS = "audio", "text", "split", "answer", "context"
AT_ONCE = 8  # Batch size: recordings read together, and windows per encoder pass.


class ListenSettings(Section):
    """Frames of recordings computed once and stored."""

    shard_recordings: int = setting(128, "recordings per file", unit="recordings", affects_key=False, ge=1)


def recordings_of(chosen: SpeechSettings, report: ReadReport) -> list[Utterance]:
    """The recordings listed in the CSV of ``speech.path``.

    Raises:
        DataError: If they cannot be read.
    """
    from mmphi.data.speech_dataset import read_recordings

    path = Path(chosen.path)
    columns = {f"{name}_column": getattr(chosen, f"{name}_column") for name in COLUMNS}
    return list(read_recordings(path, Path(chosen.recordings or path.parent), report, **columns))


def contents(settings: SettingsView) -> dict[str, Path]:
    """Maps the content digest of every recording to a file with that content."""
    from mmphi.data.content_hash import Digests
    from mmphi.data.schema import ReadReport

    paths = [each.path for each in recordings_of(settings(SpeechSettings), ReadReport())]
    return {digest: path for path, digest in Digests().of_files(paths, "recording digests").items()}


def covers(settings: SettingsView, _: Mapping[str, Result], folder: Path) -> bool:
    """Whether the stored frames cover every requested recording."""
    from mmphi.data.ragged_features import RaggedStore

    store = RaggedStore(folder)
    return all(store.knows(digest) for digest in contents(settings))


def check(settings: SettingsView) -> None:
    """Check that recordings are named and that the backend provides encoder frames.

    Raises:
        SettingsError: If ``speech.path`` is empty or ``audio.backend`` is not ``openai``.
    """
    from mmphi.errors import SettingsError

    if not settings(SpeechSettings).path:
        raise SettingsError(
            "speech.path names no recordings",
            "give a CSV whose header is audio,transcript: --speech.path recordings.csv",
        )
    if settings(AudioSettings).backend != "openai":
        raise SettingsError("faster-whisper does not provide encoder frames", "set audio.backend to openai")


def run(ctx: Context) -> Mapping[str, float]:
    """Compute and store the frames of recordings that are not stored yet."""
    from tqdm.auto import tqdm

    from mmphi.data.ragged_features import RaggedWriter
    from mmphi.data.schema import AudioRef
    from mmphi.models.audio.audio_features import encoder_frames
    from mmphi.models.audio.transcriber import openai_whisper_of, transcriber_of
    from mmphi.models.device import this_device

    wanted = contents(ctx.settings)
    transcriber = transcriber_of(ctx.settings(AudioSettings), this_device(), ctx.resources.once)
    whisper = openai_whisper_of(transcriber, "encoder")
    writer = RaggedWriter(ctx.folder, whisper.width, whisper.digest)
    taken = sum(writer.take_over(earlier.path) for earlier in ctx.earlier)
    if taken:
        ctx.tracker.say(f"listen: reusing the frames of {taken} recordings from earlier runs")
    missing = [(digest, path) for digest, path in wanted.items() if not writer.knows(digest)]
    size = ctx.settings(ListenSettings).shard_recordings
    with tqdm(total=len(missing), desc="listen", unit="recording") as bar:
        for first in range(0, len(missing), size):
            found: dict[str, Any] = {}
            unreadable: dict[str, str] = {}
            for begin in range(first, min(first + size, len(missing)), AT_ONCE):
                some = missing[begin : min(begin + AT_ONCE, first + size)]
                read = {}
                for digest, path in some:
                    try:
                        read[digest] = transcriber.recording(AudioRef(str(path), path))
                    except AudioError as error:
                        unreadable[digest] = error.reason
                found |= dict(zip(read, encoder_frames(transcriber, whisper, [*read.values()], AT_ONCE), strict=True))
                bar.update(len(some))
            writer.write(found, unreadable)
    writer.finish()
    bad = {digest: why for digest, why in writer.unreadable.items() if digest in wanted}
    if bad:
        ctx.tracker.table("unreadable", [{"recording": str(wanted[i]), "reason": why} for i, why in bad.items()])
        ctx.tracker.say(f"listen: {len(bad)} recordings cannot be read and are left out")
    if len(bad) / max(1, len(wanted)) > ctx.settings(SpeechSettings).max_bad_share:
        raise DataError(
            f"{len(bad)} of {len(wanted)} recordings cannot be read",
            "the run's table `unreadable` lists them; fix them, or raise speech.max_bad_share",
        )
    return {
        "listen/recordings": len(writer.places),
        "listen/computed": len(missing),
        "listen/unreadable": len(bad),
        "listen/frames": sum(rows for _, _, rows in writer.places.values()),
        "listen/bytes": writer.bytes,
    }


STAGE = Stage(
    name="listen",
    version=1,
    help="compute the frames that Whisper's encoder makes of every recording, and store them",
    reads=(
        "listen",
        "audio.whisper",
        "audio.backend",
        "audio.vad_threshold",
        "audio.max_chunk_s",
        "audio.pad_multiple_s",
    ),
    run=run,
    requests=("speech", "audio"),
    covers=covers,
    check=check,
)
