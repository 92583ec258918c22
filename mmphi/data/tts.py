"""``mmphi tts``: synthesize sentences with espeak-ng in many voices, as recordings for training."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mmphi.config.arguments import CommandParser
from mmphi.data.content_hash import file_digest
from mmphi.errors import DataError

PROGRAM = "espeak-ng"
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbcwmd", "en-gb-x-gbclan", "en-029")
VOICES = ("", *(f"+m{n}" for n in range(1, 8)), *(f"+f{n}" for n in range(1, 6)))
WORDS_A_MINUTE, PITCH = (130, 200), (30, 70)
SPOKEN = "spoken.csv"
FURTHER = "answer", "context"  # Columns that are copied from the sentences to the recordings.


@dataclass(frozen=True)
class SpokenSentence:
    """A sentence and its voice settings.

    Attributes:
        text: Text to synthesize.
        voice: Voice of espeak-ng: accent and speaker variant.
        speed: In words per minute.
        pitch: 0 to 99.
    """

    text: str
    voice: str
    speed: int
    pitch: int

    @property
    def name(self) -> str:
        """File name of the recording, determined by text and voice settings."""
        described = json.dumps([self.text, self.voice, self.speed, self.pitch])
        return f"{hashlib.sha256(described.encode()).hexdigest()[:20]}.wav"


def assign_voices(
    texts: Sequence[str], seed: int, accents: Sequence[str] = ACCENTS, voices: Sequence[str] = VOICES
) -> list[SpokenSentence]:
    """Returns each text with a random voice; equal seeds give equal voices.

    Args:
        texts: Texts to synthesize.
        seed: Seed of accents, speakers, speeds and pitches.
        accents: Voices of espeak-ng.
        voices: Variants of the voices, such as ``+f5``; an empty string for the plain voice.
    """
    draw = random.Random(seed)
    return [
        SpokenSentence(
            " ".join(text.split()),
            draw.choice(accents) + draw.choice(voices),
            draw.randint(*WORDS_A_MINUTE),
            draw.randint(*PITCH),
        )
        for text in texts
    ]


def synthesize(reading: SpokenSentence, folder: Path) -> Path:
    """Write a recording, if it does not exist yet, and return its path.

    Raises:
        DataError: If espeak-ng fails.
    """
    path = folder / reading.name
    if path.exists():
        return path
    part = path.with_suffix(f".{threading.get_ident()}.part")  # Two threads may write the same recording.
    settings = ["-v", reading.voice, "-s", str(reading.speed), "-p", str(reading.pitch), "-w", str(part)]
    done = subprocess.run([PROGRAM, *settings, "--", reading.text], capture_output=True, text=True, check=False)
    if done.returncode or not part.exists():
        raise DataError(
            f"{PROGRAM} cannot read {reading.text[:40]!r}: {done.stderr.strip()[:200]}", "check that it speaks English"
        )
    part.rename(path)
    return path


def rows_of(path: Path, column: str) -> list[dict[str, str]]:
    """Returns the rows of a CSV with a column, or the questions of JSON lines with turns (from the stage ``scenes``).

    Raises:
        DataError: If the file cannot be read, or has no such column.
    """
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:  # `splitlines` would also split inside JSON strings.
                return [row for line in file for row in _turns(line, column)]
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if column not in (rows.fieldnames or ()):
                raise DataError(f"{path} has no column {column!r}", f"it has {', '.join(rows.fieldnames or ())}")
            return [row for row in rows if (row[column] or "").strip()]
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}", "give a CSV in UTF-8, with a header") from error


def _turns(line: str, column: str) -> list[dict[str, str]]:
    """Questions of a conversation, each with its answer and context."""
    row = json.loads(line)
    return [
        {column: question, "answer": answer, "context": row.get("context", "")}
        for question, answer in row["turns"]
        if question.strip()
    ]


def synthesize_sentences(
    texts: Path,
    folder: Path,
    *,
    column: str,
    count: int,
    seed: int,
    apart: Path | None = None,
    accents: Sequence[str] = ACCENTS,
    voices: Sequence[str] = VOICES,
) -> int:
    """Synthesize recordings of sentences, and write ``spoken.csv`` (audio, transcript, split) to the same folder.

    Args:
        texts: CSV of sentences, whose columns ``answer`` and ``context`` are copied to ``spoken.csv``. Or JSON lines,
            each with ``turns`` of question and answer, and a ``context``.
        folder: Output folder.
        column: Column of the sentence.
        count: Maximum number of sentences, sampled at random; 0 takes all.
        seed: Seed of the sample and of the voices.
        apart: CSV of real recordings (audio, transcript) in its folder, which are copied and held out: a fifth for
            validation, the others for the test. Sentences with the same transcript, or with the same ``image`` if both
            CSVs have that column, are not synthesized.
        accents: Voices of espeak-ng.
        voices: Variants of the voices.

    Returns:
        Number of synthesized sentences.

    Raises:
        DataError: If espeak-ng is not installed or fails, or a file cannot be read.
    """
    from tqdm.auto import tqdm

    if shutil.which(PROGRAM) is None:
        raise DataError(f"there is no {PROGRAM} on this machine", "apt install espeak-ng, or brew install espeak-ng")
    real = rows_of(apart, "transcript") if apart else []
    _check_recordings(real, apart)
    known_texts, images = (
        {row["transcript"].strip() for row in real},
        {row["image"] for row in real if row.get("image")},
    )
    rows = [r for r in rows_of(texts, column) if r[column].strip() not in known_texts and r.get("image") not in images]
    random.Random(seed).shuffle(rows)
    rows = rows[: count or None]
    chosen = assign_voices([row[column] for row in rows], seed, accents, voices)
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        spoken = workers.map(lambda each: synthesize(each, folder), chosen)
        for _ in tqdm(spoken, total=len(chosen), desc="tts", unit="sentence"):
            pass
    further = [name for name in FURTHER if rows and name in rows[0]]
    lines = [
        {"audio": each.name, "transcript": each.text, "split": "train" if real else ""}
        | {name: row.get(name) or "" for name in further}
        for each, row in zip(chosen, rows, strict=True)
    ]
    for number, row in enumerate(real):
        assert apart is not None
        path = apart.parent / row["audio"]
        name = f"{file_digest(path)[:20]}{path.suffix}"  # Recordings in different folders may have the same name.
        shutil.copy2(path, folder / name)
        split = "test" if number % 5 else "validation"
        lines.append({"audio": name, "transcript": row["transcript"].strip(), "split": split})
    part = folder / f"{SPOKEN}.part"
    with part.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["audio", "transcript", "split", *further], restval="")
        table.writeheader()
        table.writerows(lines)
    part.rename(folder / SPOKEN)
    return len(chosen)


def _check_recordings(rows: Sequence[Mapping[str, str]], table: Path | None) -> None:
    """Check that the recordings of a CSV exist, before anything is synthesized.

    Raises:
        DataError: If the column ``audio`` or a file is missing.
    """
    for number, row in enumerate(rows, 1):
        if not row.get("audio"):
            raise DataError(f"{table}, row {number}: the column audio is missing or empty", "name the recording there")
        assert table is not None
        if not (table.parent / row["audio"]).is_file():
            raise DataError(f"{table}, row {number}: there is no file {row['audio']}", f"put it into {table.parent}")


def main(arguments: Sequence[str]) -> int:
    """``mmphi tts``."""
    parser = CommandParser(prog="mmphi tts", description=__doc__.partition("\n")[0])
    parser.add_argument("texts", type=Path, help="CSV of sentences, or JSON lines with turns")
    parser.add_argument("folder", type=Path, help="where the recordings and spoken.csv go")
    parser.add_argument("--column", default="caption", help="column of the sentence [caption]")
    parser.add_argument(
        "--count", type=int, default=0, help="maximum number of sentences, sampled at random; 0 takes all [0]"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample and of the voices [0]")
    parser.add_argument("--apart", type=Path, help="CSV of real recordings (audio,transcript) to validate and test on")
    parser.add_argument(
        "--accents", default=",".join(ACCENTS), help=f"voices of espeak-ng, separated by commas [{','.join(ACCENTS)}]"
    )
    parser.add_argument(
        "--voices",
        default=",".join(VOICES),
        help="variants of the voices; begin with a comma to include the plain voice [all]; Whisper recognizes en-us"
        " best as the plain voice, +m1, +m2, +m6 and +f5",
    )
    given = parser.parse_args(list(arguments))
    shape = {name: getattr(given, name) for name in ("column", "count", "seed", "apart")}
    count = synthesize_sentences(
        given.texts, given.folder, **shape, accents=given.accents.split(","), voices=given.voices.split(",")
    )
    print(f"{count} sentences in {given.folder / SPOKEN}")
    return 0
