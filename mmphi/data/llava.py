"""LLaVA-Instruct JSON, as the real file is: ids of either type, rows without image, ``<image>`` at either end.

A row may also have several images, as LLaVA-NeXT-Interleave's and Mantis' rows do: ``image`` is then a list.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmphi.data.images import ImageFolder
from mmphi.data.kinds import kind_of
from mmphi.data.records import Example, ReadReport, Split, Turn
from mmphi.errors import DataError, ImageError
from mmphi.text.prompt import MARK


def load_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: If it is missing, not UTF-8 or malformed; the line and column are named.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "check the path in data.sources") from error
    try:
        return json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: {error.msg}", "mend the file there, or fetch it anew"
        ) from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 ({error.reason})", "save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:  # A number of thousands of digits, thousands of brackets.
        raise DataError(f"{path} cannot be read: {error}", "such a file holds no conversations") from error


def read_llava(path: Path, images: Path, source: str, report: ReadReport, split: Split = "train") -> Iterator[Example]:
    """Read conversations, counting the rows that cannot be used.

    Args:
        path: The JSON file: a list of ``{"id", "image", "conversations": [{"from", "value"}, ...]}``.
        images: Folder that image paths are relative to.
        source: Name of the source.
        report: Counts what was kept and dropped.
        split: Given to every example; the split by image comes later where the source has none of its own.

    Raises:
        DataError: If the file is no JSON list.
    """
    rows = load_json(path)
    if not isinstance(rows, list):
        raise DataError(f"{path} holds a {type(rows).__name__}, not a list of conversations")
    folder, seen = ImageFolder(images, source, report.note), Counter[str]()
    for number, row in enumerate(rows):
        where = f"{path.name}, row {number}"
        try:
            example = _example(row, number, folder, split)
        except ImageError as error:
            report.drop(source, where, error.reason)
        except DataError as error:
            report.drop(source, where, error.what)
        else:
            report.keep(source)
            # LLaVA-Instruct-150k names rows by their image, and has up to three of one image.
            seen[example.id] += 1
            again = seen[example.id] > 1
            yield replace(example, id=f"{example.id}#{seen[example.id]}") if again else example


def _example(row: Any, number: int, folder: ImageFolder, split: Split) -> Example:
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        raise DataError("malformed row")
    turns = []
    messages = row["conversations"]
    if messages and isinstance(messages[0], dict) and messages[0].get("from") == "gpt":
        messages = messages[1:]  # LLaVA's own reader skips an answer that no question precedes.
    images = _images(row.get("image"))
    for human, model in zip(messages[::2], messages[1::2], strict=False):
        try:
            if human["from"] != "human" or model["from"] != "gpt":
                raise DataError("turns out of order")
            turns.append(Turn(human["value"].strip(), model["value"].strip()))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError("malformed turn") from error
    if not turns:
        raise DataError("no answered question")
    marks = sum(turn.question.count(MARK) for turn in turns)
    if len(images) < 2:
        # One image stands before everything, wherever the row has it: LLaVA's own training moves it there.
        turns = [replace(turn, question=turn.question.replace(MARK, "").strip()) for turn in turns]
    elif marks not in (0, len(images)):
        raise DataError("another number of <image> than images")
    name, attributes = row.get("id"), row.get("attributes")
    return Example(
        id=str(number if name is None else name),
        images=tuple(folder.find(image) for image in images),
        turns=tuple(turns),
        source=folder.source,
        split=split,
        attributes={str(k): str(v) for k, v in attributes.items()}
        if isinstance(attributes, dict)
        else {"kind": kind_of(turns)},
    )


def _images(value: Any) -> list[str]:
    images = value if isinstance(value, list) else [value] if value else []
    if not all(isinstance(image, str) and image for image in images):
        raise DataError("malformed row")
    return images
