"""Reads a CSV of recordings and their transcripts."""

from __future__ import annotations

import csv
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmphi.data.content_hash import Digests
from mmphi.data.images import resolve_inside
from mmphi.data.schema import AudioRef, Example, ReadReport, Split, Turn
from mmphi.errors import DataError, ImageError

SOURCE = "recordings"
SPLITS = ("", "train", "validation", "test")


@dataclass(frozen=True)
class Utterance:
    """A recording with its transcript.

    Attributes:
        name: Path as given in the CSV.
        path: Resolved path of the file.
        text: Reference transcript; ``None`` if the CSV has none.
        split: ``train``, ``validation`` or ``test``; empty if the CSV gives none.
        answer: Target answer; if empty, the target is the transcript.
        context: Text that the recording refers to; may be empty.
    """

    name: str
    path: Path
    text: str | None = None
    split: str = ""
    answer: str = ""
    context: str = ""


def read_recordings(
    path: Path,
    folder: Path,
    report: ReadReport,
    *,
    audio_column: str = "audio",
    text_column: str = "transcript",
    split_column: str = "split",
    answer_column: str = "answer",
    context_column: str = "context",
) -> Iterator[Utterance]:
    """Read a CSV with a header and one recording per row.

    Args:
        path: Path of the CSV.
        folder: Folder that the recordings' paths are relative to; none may lead out of it.
        report: Counts kept and dropped rows.
        audio_column: Column of the recordings' paths.
        text_column: Column of transcripts; without it, recordings can be transcribed but have no error rate.
        split_column: Column of the splits ``train``, ``validation`` or ``test``; optional.
        answer_column: Column of target answers; optional.
        context_column: Column of texts that the recordings refer to; optional.

    Raises:
        DataError: If the file cannot be read or lacks the column of recordings.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            if audio_column not in (rows.fieldnames or ()):
                have = ", ".join(rows.fieldnames or ()) or "nothing"
                raise DataError(
                    f"{path} has no column {audio_column!r}; it has {have}",
                    "name its column in transcribe.audio_column",
                )
            for row in rows:
                where = f"{path.name}, line {rows.line_num}"
                name = row[audio_column]
                if not name or None in row:
                    report.drop(SOURCE, where, "malformed row")
                    continue
                try:
                    found = resolve_inside(folder, name)
                except ImageError as error:
                    report.drop(SOURCE, where, error.reason.replace("image", "recordings'"))
                    continue
                if not found.is_file():
                    report.drop(SOURCE, where, "missing")
                    continue
                split = (row.get(split_column) or "").strip()
                if split not in SPLITS:
                    report.drop(SOURCE, where, f"no split: {split_column} = {split}")
                    continue
                report.keep(SOURCE)
                answer, context = (row.get(column) or "" for column in (answer_column, context_column))
                yield Utterance(name, found, row.get(text_column), split, answer.strip(), context)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", "save it as CSV in UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "check the path in transcribe.path") from error


def recordings_digest(path: Path, audio_column: str, digests: Digests) -> str:
    """Returns the SHA-256 of the names and contents of the recordings in a CSV, with paths relative to its folder.

    Raises:
        DataError: If the CSV cannot be read or lacks the column.
    """
    spoken = list(read_recordings(path, path.parent, ReadReport(), audio_column=audio_column))
    known = digests.of_files([each.path for each in spoken], "recordings")
    whole = hashlib.sha256()
    for each in spoken:
        whole.update(f"{each.name}\0{known.get(each.path, '')}\0".encode())
    return whole.hexdigest()


def spoken_examples(
    spoken: Sequence[Utterance], report: ReadReport, *, question: str, validation: int, test: int, seed: int
) -> list[Example]:
    """Returns conversations of one recording each, with its answer or its transcript as the target.

    Args:
        spoken: Recordings; those without a transcript are counted and left out.
        report: Counts recordings without a transcript.
        question: Question, with the mark ``<audio>`` at the position of the recording.
        validation: Number of recordings for validation, if the CSV assigns no splits.
        test: Number of recordings for the test, if the CSV assigns no splits.
        seed: Seed of the split.

    Raises:
        DataError: If no recordings are left for training.
    """
    kept = []
    for each in spoken:
        if each.text and each.text.strip():
            kept.append(each)
        else:
            report.drop_kept(SOURCE, each.name, "no transcript")
    names = sorted({each.name for each in kept if not each.split})
    random.Random(seed).shuffle(names)
    drawn: dict[str, Split] = dict.fromkeys(names, "train")
    if not any(each.split for each in kept):
        drawn |= dict.fromkeys(names[:validation], "validation")
        drawn |= dict.fromkeys(names[validation : validation + test], "test")
    examples = []
    for each in kept:
        split: Split = each.split or drawn[each.name]  # type: ignore[assignment]  # One of SPLITS.
        transcript = str(each.text).strip()
        audio = (AudioRef(each.name, each.path),)
        turns = (Turn(question, each.answer or transcript),)
        examples.append(Example(each.name, (), turns, SOURCE, split, {"said": transcript}, each.context, audio))
    if not any(example.split == "train" for example in examples):
        raise DataError(f"none of {len(examples)} recordings is left for training", "hold out fewer: validation, test")
    return examples
