"""Reads all sources of an experiment into one list of examples, split by image, and reports every row."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mmphi.config.shared import DataSettings, sources_of
from mmphi.data.duplicates import picture_names
from mmphi.data.readers import READERS, read_source
from mmphi.data.schema import SPLITS, Example, ImageRef, ReadReport, Split
from mmphi.errors import DataError


def read_examples(data: DataSettings, scenes: Path | None) -> tuple[list[Example], ReadReport]:
    """Read every source.

    Args:
        data: The ``data`` section.
        scenes: Folder of the drawn scenes; ``None`` if no source uses them.

    Returns:
        Usable examples of all splits, and the report of all rows.

    Raises:
        DataError: If a file cannot be read.
        SettingsError: If the path of a source is not set.
    """
    report = ReadReport()
    examples: list[Example] = []
    for source in sources_of(data):
        name = source.name or source.kind
        limited = _limit(read_source(source, name, report, scenes), data.max_images, report)
        usable = [e for e in limited if _usable(e, data, report)]
        examples += usable if READERS[source.kind].brings_splits else split_by_image(usable, data)
    return align_splits_of_duplicates(examples, report, near=data.near_duplicates == "group"), report


def _limit(examples: Iterable[Example], images: int, report: ReadReport) -> Iterator[Example]:
    """Examples about the first ``images`` images of each split of a source; all of them if ``images`` is 0."""
    seen: dict[Split, set[str]] = {split: set() for split in SPLITS}
    for example in examples:
        if images and example.images:
            known = seen[example.split]
            new = {image.id for image in example.images} - known
            if new and len(known) + len(new) > images:
                report.kept[example.source] -= 1  # Neither kept nor dropped as bad.
                continue
            known |= new
        yield example


def _usable(example: Example, data: DataSettings, report: ReadReport) -> bool:
    for turn in example.turns:
        try:
            (turn.question + turn.answer).encode()
        except UnicodeEncodeError:  # JSON may hold a lone surrogate, which no tokenizer accepts.
            report.drop_kept(example.source, example.id, "text is not Unicode")
            return False
        if not turn.answer.strip():
            report.drop_kept(example.source, example.id, "empty answer")
            return False
        most = data.max_answer_words
        if len(turn.answer) > 2 * most and len(turn.answer.split()) > most:  # n words have at least 2 n - 1 characters.
            report.drop_kept(example.source, example.id, f"answer over {most} words")
            return False
    return True


def split_by_image(examples: list[Example], data: DataSettings) -> list[Example]:
    """Assign each example the split of its images, so that all captions of an image are in one split.

    Images are ordered by a digest of their path and the seed, so that adding an image moves at most one other across
    each boundary. An example with several images gets the strictest of their splits. Examples without images are for
    training.

    Args:
        examples: Examples of one source.
        data: Numbers of validation and test images, and the seed.

    Raises:
        DataError: If no images would be left for training.
    """

    def rank(image: str) -> bytes:
        return hashlib.sha256(f"{data.split_seed}/{image.removeprefix(prefix)}".encode()).digest()

    prefix = f"{examples[0].source}/" if examples else ""
    images = sorted({image.id for e in examples for image in e.images}, key=rank)
    wanted = data.validation_images + data.test_images
    if images and wanted >= len(images):
        raise DataError(
            f"validation and test take {data.validation_images} + {data.test_images} images of"
            f" {examples[0].source!r}, but it has {len(images)} in all",
            _smaller_splits(len(images)),
        )
    split: dict[str, Split] = dict.fromkeys(images, "train")
    split.update(dict.fromkeys(images[: data.test_images], "test"))
    split.update(dict.fromkeys(images[data.test_images : wanted], "validation"))
    splits = [_strictest(split[image.id] for image in e.images) for e in examples]
    return [e if e.split == own else replace(e, split=own) for e, own in zip(examples, splits, strict=True)]


def _smaller_splits(images: int) -> str:
    """Hint with the YAML lines that hold out a tenth of the images for each split."""
    share = images // 10 or 1
    if images <= 2 * share:
        return "add images: training, validation and test need one each"
    return f"add these lines to the YAML file:\n  data:\n    validation_images: {share}\n    test_images: {share}"


def _strictest(splits: Iterable[Split]) -> Split:
    return max(splits, key=SPLITS.index, default="train")


def align_splits_of_duplicates(examples: list[Example], report: ReadReport, *, near: bool = False) -> list[Example]:
    """Move all files with the same picture to the same split, so that no test picture is used in training.

    Args:
        examples: Examples of all sources.
        report: Counts duplicate files, and examples whose split changes.
        near: Whether near duplicates count as the same picture.
    """
    if all(example.split == "train" for example in examples):
        return examples
    files = images_of(examples)
    picture = picture_names((image.path for image in files), near=near)
    first: dict[str, ImageRef] = {}
    for image in files:
        if first.setdefault(picture[image.path], image) is not image:
            report.note(image.id.partition("/")[0], f"files with a duplicate picture{' or a near duplicate' * near}")
    strictest: dict[str, Split] = {}
    for example in examples:
        for image in example.images:
            name = picture[image.path]
            strictest[name] = _strictest([example.split, strictest.get(name, "train")])
    agreed = []
    for example in examples:
        split = _strictest([example.split, *(strictest[picture[image.path]] for image in example.images)])
        if split != example.split:
            report.note(example.source, f"moved to {split}, which has the same picture")
            example = replace(example, split=split)
        agreed.append(example)
    return _apart(agreed, picture, report)


def _apart(examples: list[Example], picture: Mapping[Path, str], report: ReadReport) -> list[Example]:
    """Leave out examples with several images of which one is held out in a stricter split.

    Moving them would also hold out their other pictures, and so on; if rows overlap, no training data would remain.
    """
    held: set[str] = set()
    left_out: set[int] = set()
    for split in reversed(SPLITS):
        own = [e for e in examples if e.split == split]
        for example in own:
            if any(picture[image.path] in held for image in example.images):
                left_out.add(id(example))
                report.kept[example.source] -= 1  # Neither kept nor dropped as bad.
                report.note(example.source, f"rows of {split} left out: one of their pictures is held out elsewhere")
        held |= {picture[image.path] for e in own if id(e) not in left_out for image in e.images}
    return [e for e in examples if id(e) not in left_out]


def images_of(examples: Iterable[Example]) -> list[ImageRef]:
    """Returns each image of the examples once, in order."""
    return list({image.path: image for e in examples for image in e.images}.values())


def stratified(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Returns a seeded sample with equal numbers of each source and kind of conversation, where available.

    Args:
        examples: Examples to sample from.
        count: Maximum number of examples.
        seed: Seed of the sample.
    """
    groups: dict[tuple[str, str], list[Example]] = {}
    for example in examples:
        groups.setdefault((example.source, example.attributes.get("kind", "")), []).append(example)
    rng = random.Random(seed)
    for group in groups.values():
        rng.shuffle(group)
    turns = itertools.zip_longest(*groups.values())
    return [e for turn in turns for e in turn if e is not None][:count]
