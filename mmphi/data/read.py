"""All sources of an experiment read into one list of examples, split by image, with an account of every row."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from mmphi.data.captions import read_captions, read_karpathy
from mmphi.data.hub import read_dataset
from mmphi.data.llava import read_llava
from mmphi.data.records import Example, ReadReport, Split
from mmphi.errors import DataError, SettingsError
from mmphi.settings import DataSettings, Settings, SourceSettings
from mmphi.stage import Tracker

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def read_examples(settings: Settings, scenes: Path | None) -> tuple[list[Example], ReadReport]:
    """Read every source.

    Args:
        settings: Its ``data`` section says what to read.
        scenes: Folder of the drawn scenes, where a source asks for them.

    Returns:
        Usable examples of all splits, and the account of what was read.

    Raises:
        DataError: If a file cannot be read at all.
        SettingsError: If a source does not say where its files are.
    """
    report = ReadReport()
    examples: list[Example] = []
    for source in settings.data.sources or [SourceSettings()]:
        name = source.name or source.kind
        found = _limit(_read(source, name, scenes, report), settings.data.max_images, report)
        usable = [e for e in found if _usable(e, settings.data, report)]
        brings_splits = source.kind in ("scenes", "karpathy")
        examples += usable if brings_splits else split_by_image(usable, settings.data)
    return one_split_per_file(examples), report


def _read(source: SourceSettings, name: str, scenes: Path | None, report: ReadReport) -> Iterator[Example]:
    for key in {"scenes": (), "datasets": ("path",)}.get(source.kind, ("path", "images")):
        if not getattr(source, key):
            raise SettingsError(f"the source {name!r} of kind {source.kind} has no {key}", f"set its {key}")
    path, images = Path(source.path), Path(source.images)
    image, text, question = source.image_column, source.text_column, source.question
    match source.kind:
        case "scenes":
            if scenes is None:
                raise DataError("a source asks for scenes, but none were drawn")
            for split in SPLITS:
                yield from read_llava(scenes / f"{split}.json", scenes / "images", name, report, split)
        case "llava":
            yield from read_llava(path, images, name, report)
        case "captions":
            yield from read_captions(
                path, images, name, report, image_column=image, text_column=text, question=question
            )
        case "karpathy":
            yield from read_karpathy(path, images, name, report, question=question)
        case "datasets":
            yield from read_dataset(
                source.path, source.split, name, report, image_column=image, text_column=text, question=question
            )


def _limit(examples: Iterable[Example], images: int, report: ReadReport) -> Iterator[Example]:
    """The examples of the first images of every split that the source brings."""
    seen: dict[Split, set[str]] = {split: set() for split in SPLITS}
    for example in examples:
        if images and example.image is not None:
            known = seen[example.split]
            if len(known) >= images and example.image.id not in known:
                report.kept[example.source] -= 1  # Not bad, not wanted.
                continue
            known.add(example.image.id)
        yield example


def _usable(example: Example, data: DataSettings, report: ReadReport) -> bool:
    for turn in example.turns:
        try:
            (turn.question + turn.answer).encode()
        except UnicodeEncodeError:  # JSON may hold half a surrogate pair, which no tokenizer takes.
            report.drop_kept(example.source, example.id, "text is not Unicode")
            return False
        words = len(turn.answer.split())
        if not words:
            report.drop_kept(example.source, example.id, "empty answer")
            return False
        if words > data.max_answer_words:
            report.drop_kept(example.source, example.id, f"answer over {data.max_answer_words} words")
            return False
    return True


def split_by_image(examples: list[Example], data: DataSettings) -> list[Example]:
    """Give every example the split of its image: captions of one image never stand on both sides.

    Images are ordered by a digest of their path and the seed, so that adding one to the data moves at most one over
    each border. Examples without an image are for training.

    Args:
        examples: Of one source.
        data: Says how many images are kept apart, and the seed.

    Raises:
        DataError: If there are fewer images than the splits ask for.
    """

    def rank(image: str) -> bytes:
        return hashlib.sha256(f"{data.split_seed}/{image.removeprefix(prefix)}".encode()).digest()

    prefix = f"{examples[0].source}/" if examples else ""
    images = sorted({e.image.id for e in examples if e.image is not None}, key=rank)
    wanted = data.validation_images + data.test_images
    if images and wanted >= len(images):
        raise DataError(
            f"{wanted} images of {examples[0].source!r} are to be kept apart, but it has {len(images)} in all",
            "lower data.validation_images and data.test_images",
        )
    split: dict[str, Split] = dict.fromkeys(images, "train")
    split.update(dict.fromkeys(images[: data.test_images], "test"))
    split.update(dict.fromkeys(images[data.test_images : wanted], "validation"))
    return [replace(e, split=split[e.image.id] if e.image is not None else "train") for e in examples]


def one_split_per_file(examples: list[Example]) -> list[Example]:
    """Let sources that share image files agree: what one of them tests on, no other trains on."""
    strictest: dict[Path, Split] = {}
    for example in examples:
        if example.image is not None:
            path = example.image.path
            strictest[path] = max(example.split, strictest.get(path, "train"), key=SPLITS.index)
    return [
        e if e.image is None or e.split == strictest[e.image.path] else replace(e, split=strictest[e.image.path])
        for e in examples
    ]


def mixture(examples: list[Example], settings: Settings) -> list[Example]:
    """Training examples in the proportions of their sources' weights.

    The mixture is as long as all sources together; each source is repeated whole and then sampled, with a seed, up to
    its share.

    Args:
        examples: Training examples of all sources.
        settings: Its ``data`` section holds weights and seed.
    """
    sources = settings.data.sources
    if len(sources) < 2:
        return examples
    by_source: dict[str, list[Example]] = {s.name or s.kind: [] for s in sources}
    for example in examples:
        by_source[example.source].append(example)
    weights = {s.name or s.kind: s.weight for s in sources if by_source[s.name or s.kind]}
    total = sum(weights.values())
    rng = random.Random(settings.data.split_seed)
    mixed: list[Example] = []
    for name, weight in weights.items():
        have, count = by_source[name], round(len(examples) * weight / total)
        mixed += have * (count // len(have)) + rng.sample(have, count % len(have))
    rng.shuffle(mixed)
    return mixed


def log_report(report: ReadReport, tracker: Tracker, settings: Settings) -> None:
    """Record the account of what was read.

    Raises:
        DataError: If more rows are bad than the settings allow, or none is left.
    """
    tracker.table("data_read", list(report.rows()))
    if not report.kept.total() and not report.dropped:
        raise DataError("the data has no rows", "check the files that data.sources name")
    if report.bad_share > settings.data.max_bad_share or not report.kept.total():
        raise DataError(
            f"{report.bad_share:.1%} of the rows cannot be used; at most {settings.data.max_bad_share:.1%} may be\n"
            + report.table(),
            "mend the data, or raise data.max_bad_share",
        )
