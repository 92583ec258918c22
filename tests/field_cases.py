"""Inputs from the field, one line each with what is expected and what happens: ``python tests/field_cases.py FOLDER``.

The folder holds the cases by number. The exit code is 1 where something else happens than is expected.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent
CLIENTS = "30_openai_clients/requests.py"
REQUEST_LINE = re.compile(r"^(.{34}) (\d{3}|EXC) ?(.*)$")
# Requests that are not answered, by the first word of their line: the status, and the parameter that is named.
REFUSED = {
    "d:": (400, "messages"),  # The last message is an answer.
    "f:": (400, "messages"),  # Results of tools.
    "i:": (400, "messages"),  # An image without `data:` is a URL that is not fetched.
    "q:": (400, "messages"),  # A part of another interface.
    "r:": (400, ""),  # JSON with half of a surrogate pair.
    "w:": (400, "n"),
    "x:": (400, "max_tokens"),
    "z:": (400, "stop"),
    "aa:": (400, "seed"),
    "ab:": (400, "response_format"),
    "ac:": (400, "logprobs"),
    "ad:": (400, "tools"),
    "ae:": (405, ""),  # Without --cors.
    "af:": (404, "model"),
    "ag:": (404, ""),
    "ah:": (404, ""),
    "ai:": (404, "model"),
}
# Seconds of sound, or None where the file holds none, and words of what is reported about the file. The seconds were
# counted without a decoder: by MP3 frames, bytes of samples, FLAC's header, and time stamps of packets.
SOUND: dict[str, tuple[float | None, str]] = {
    "13_mp3_two_rates/good1.mp3": (5.09, ""),
    "13_mp3_two_rates/good2.mp3": (4.27, ""),
    "13_mp3_two_rates/joined.mp3": (8.67, ""),
    "13_mp3_two_rates/rate_only.mp3": (8.67, ""),
    "13_mp3_two_rates/channels_only.mp3": (6.53, ""),
    "14_wav_placeholder_size/ffffffff.wav": (4.25, ""),
    "14_wav_placeholder_size/two_billion.wav": (4.25, ""),
    "16_webm_no_duration/whole.webm": (3.43, ""),
    "16_webm_no_duration/frag.mp4": (3.45, ""),
    "16_webm_no_duration/last_cluster_cut.webm": (2.77, ""),
    "16_webm_no_duration/header_only.webm": (None, "not a readable recording"),
    "17_opposite_phase/left_only.flac": (2.54, ""),
    "17_opposite_phase/left_minus_right.flac": (2.54, "cancel each other"),
}
# Kind of source; rows that are kept, their images, and words of the report on the others. No row: an error.
ROWS: dict[str, tuple[Any, int, int, str]] = {
    "01_messages_role_content/data.json": ("llava", 12, 12, ""),
    "02_images_key/data.json": ("llava", 12, 12, ""),
    "04_jsonl/data.jsonl": ("llava", 12, 12, ""),
    "05_excel_semicolon/captions.csv": ("captions", 0, 0, "not UTF-8"),
    "05b_semicolon_utf8/captions.csv": ("captions", 12, 12, ""),
    "06_caption_broken_line/captions.csv": ("captions", 36, 36, "malformed row"),
    "12_odd_turns/data.json": ("llava", 9, 9, "an answer without its question"),
}
UNREADABLE = {"IMG_0001.JPG": "HEIC is not supported", "cut.jpg": "truncated or broken image"}
CORPORA = {
    "list.json": (200, ""),
    "powershell.jsonl": (200, ""),
    "train.parquet": (200, ""),
    "bom.jsonl": (200, ""),
    "gbk.txt": (0, "unknown encoding"),
    "late_byte.txt": (0, "unknown encoding"),
    "chat.jsonl": (0, "a list in place of a text"),
    "content_key.jsonl": (0, "a row without 'text' (it has id, content)"),
}


@dataclass(frozen=True)
class Outcome:
    """A case: what is expected, what happens, and whether they agree."""

    name: str
    expected: str
    actual: str
    right: bool


def clients(folder: Path) -> Iterator[Outcome]:
    """Requests as clients send them, to a server that decodes images and recordings."""
    from answerers import Same, answerer, served

    from mmphi.data.audio import read_audio
    from mmphi.models.audio.audio_features import TranscriptFeatures
    from mmphi.models.audio.transcription import Transcript
    from mmphi.models.multimodal import Multimodal

    class Decoding(Same):
        """Opens every recording, as a recogniser does."""

        def transcripts(self, recordings: Sequence[Any], check: Any = None) -> list[Transcript]:
            for recording in recordings:
                read_audio(recording.source)
            return super().transcripts(recordings, check)

    plain = answerer()
    audio_source = TranscriptFeatures(plain.language, Decoding())
    model = Multimodal(plain.language, plain.projector, plain.features, audio_source=audio_source)
    with served(model, slots=2) as address:
        script = [sys.executable, str(folder / CLIENTS), address]
        done = subprocess.run(script, capture_output=True, text=True, check=True, timeout=600)
    for line in done.stdout.splitlines():
        found = REQUEST_LINE.match(line)
        if found is None:
            raise ValueError(f"{CLIENTS} printed {line!r}")
        name, status, body = found.group(1).strip(), found.group(2), found.group(3)
        wanted, param = REFUSED.get(name.split()[0], (200, ""))
        expected = f"{wanted} {param}".strip()
        named = re.search(r'"param":"([^"]*)"', body)
        actual = f"{status} {named.group(1)}" if named else status
        shaped = wanted == 200 or '"error":{"message":' in body
        yield Outcome(f"30 {name}", expected, f"{actual}  {body[:60]}", actual == expected and shaped)


def sound(folder: Path) -> Iterator[Outcome]:
    """Recordings: how much of each is decoded, and what is reported about it."""
    from mmphi.data.audio import read_audio
    from mmphi.errors import AudioError

    for path, (seconds, words) in SOUND.items():
        expected = f"error: {words}" if seconds is None else f"{seconds:.2f} s of sound {words}".strip()
        try:
            recording = read_audio(folder / path)
        except AudioError as error:
            yield Outcome(path, expected, f"error: {error.what}", seconds is None and words in str(error))
            continue
        loud = float(np.abs(recording.samples).max()) > 0.01
        reported = "; ".join(recording.defects)
        actual = f"{recording.seconds:.2f} s of {'sound' if loud else 'silence'} {reported}".strip()
        near = seconds is not None and abs(recording.seconds - seconds) < 0.05
        yield Outcome(path, expected, actual, loud and near and words in reported)


def rows(folder: Path) -> Iterator[Outcome]:
    """Files of conversations and captions: rows that are kept, with how many images, and the report on others."""
    from mmphi.config import DataSettings, SourceSettings
    from mmphi.data.dataset_builder import read_examples
    from mmphi.errors import DataError

    for path, (kind, kept, images, words) in ROWS.items():
        own = folder / path
        pictures = own.parent / "images" if (own.parent / "images").is_dir() else folder / "photos"
        source = SourceSettings(kind=kind, path=str(own), images=str(pictures))
        expected = f"{kept} rows with {images} images; {words}" if kept else f"error: {words}"
        try:
            examples, report = read_examples(DataSettings(sources=[source], validation_images=0, test_images=0), None)
        except DataError as error:
            yield Outcome(path, expected, f"error: {error.what}", not kept and words in str(error))
            continue
        shown = sum(len(example.images) for example in examples)
        outcomes = "; ".join(f"{row['outcome']} ({row['rows']})" for row in report.rows())
        right = (len(examples), shown) == (kept, images) and words in outcomes
        yield Outcome(path, expected, f"{len(examples)} rows with {shown} images; {outcomes}", right)


def pictures(folder: Path) -> Iterator[Outcome]:
    """Image files: opened, or refused with the true reason."""
    from mmphi.data.images import open_image
    from mmphi.errors import ImageError

    for path in sorted((folder / "09_odd_images" / "images").iterdir()):
        expected = UNREADABLE.get(path.name, "opened")
        try:
            image = open_image(path)
        except ImageError as error:
            yield Outcome(f"09 {path.name}", expected, error.reason, error.reason == expected)
            continue
        bright = max(high for _, high in image.getextrema())
        actual = "opened" if bright > 100 else f"opened, but its brightest value is {bright}"
        yield Outcome(f"09 {path.name}", expected, actual, actual == expected)


def corpora(folder: Path) -> Iterator[Outcome]:
    """Texts: how many documents are read, and why others are not."""
    from mmphi.data.text_sources import TextReport, read_texts

    for name, (documents, words) in CORPORA.items():
        report = TextReport()
        text = "".join(piece.text for piece in read_texts(str(folder / "31_text_corpora" / name), report))
        skipped = "; ".join(report.lines())
        expected = f"{documents} documents; {words}"
        right = report.documents == documents and words in skipped and '"text"' not in text and "\x00" not in text
        yield Outcome(f"31 {name}", expected, f"{report.documents} documents; {skipped}", right)


SETS: tuple[Callable[[Path], Iterator[Outcome]], ...] = (clients, sound, rows, pictures, corpora)


def main(arguments: Sequence[str]) -> int:
    """Print all cases; 1 where one is not as expected."""
    sys.path.insert(0, str(ROOT / "serving"))
    wrong = 0
    for kind in SETS:
        for outcome in kind(Path(arguments[0])):
            wrong += not outcome.right
            mark = "ok   " if outcome.right else "WRONG"
            print(f"{mark} {outcome.name:40} expected: {outcome.expected:32} actual: {outcome.actual}", flush=True)
    print(f"{wrong} cases are not as expected")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
