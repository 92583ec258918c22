"""Conversations as tokens, encoded once and memory-mapped by all stages, ranks and trials."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from mmphi.data.content_hash import cache_folder
from mmphi.data.schema import AudioRef, Example, ImageRef, ReadReport
from mmphi.errors import DataError, ModelError
from mmphi.text.prompt import Prompt
from mmphi.text.tokenized_example import FeatureSpan, SpanContent, TokenizedExample, tokenize_conversation

ARRAYS = ("ids", "supervised", "starts", "examples", "spans", "span_starts")
FORMAT = 1


class TokenizedExamples(Sequence[TokenizedExample], ABC):
    """Tokenized examples that are created on access."""

    @abstractmethod
    def at(self, index: int) -> TokenizedExample:
        """Returns the tokenized example at a non-negative index."""

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenizedExample]: ...

    def __getitem__(self, index: int | slice) -> TokenizedExample | list[TokenizedExample]:
        places = range(len(self))[index]
        return self.at(places) if isinstance(places, int) else [self.at(place) for place in places]


class TokenizedDataset(TokenizedExamples):
    """Tokenized examples that are read from memory-mapped files on access.

    Args:
        folder: Folder that :func:`tokenized_examples` has written.
        examples: The encoded examples.

    Attributes:
        kept: The example of every sequence.
        left_out: Indices of the examples without a sequence.
    """

    def __init__(self, folder: Path, examples: Sequence[Example]) -> None:
        self._ids, self._supervised, self._starts, self._examples, self._spans, self._span_starts = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS
        )
        self._of = examples
        self.kept = [examples[i] for i in self._examples]
        self.left_out: list[int] = json.loads((folder / "left_out.json").read_text())

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def sources(self) -> list[str]:
        """Source of every sequence."""
        return [example.source for example in self.kept]

    def at(self, index: int) -> TokenizedExample:
        """Returns the tokenized example at a non-negative index."""
        example = self._of[self._examples[index]]
        begin, end = self._starts[index], self._starts[index + 1]
        rows = self._spans[self._span_starts[index] : self._span_starts[index + 1]].tolist()
        spans = tuple(FeatureSpan("image", example.images[image], start, length) for image, start, length in rows)
        ids, supervised = np.array(self._ids[begin:end]), np.array(self._supervised[begin:end])
        return TokenizedExample(ids, supervised, spans, f"{example.source}/{example.id}")


class Subset(TokenizedExamples):
    """Tokenized examples selected by index, in any order and with repetition."""

    def __init__(self, of: Sequence[TokenizedExample], indices: Sequence[int]) -> None:
        self._of, self._indices = of, indices

    def __len__(self) -> int:
        return len(self._indices)

    def at(self, index: int) -> TokenizedExample:
        """Returns the tokenized example at a non-negative index."""
        return self._of[self._indices[index]]


def image_inputs(images: Iterable[ImageRef], length: Callable[[ImageRef], int]) -> list[SpanContent]:
    """Returns the contents of the feature spans of images.

    Args:
        images: Images in order.
        length: Number of features of an image.
    """
    return [SpanContent("image", image, length(image)) for image in images]


def tokenize_example(
    example: Example,
    prompt: Prompt,
    length: Callable[[ImageRef], int],
    max_length: int,
    audio_inputs: Callable[[Sequence[AudioRef]], list[SpanContent]] | None = None,
) -> TokenizedExample | None:
    """Returns a tokenized conversation; ``None`` if it does not fit in ``max_length`` tokens.

    Raises:
        ModelError: If the example has recordings and ``audio_inputs`` is ``None``.
    """
    inputs = image_inputs(example.images, length)
    if example.audio:
        if audio_inputs is None:
            raise ModelError(f"{example.source}/{example.id} has recordings, but the model takes no audio")
        inputs += audio_inputs(example.audio)
    name = f"{example.source}/{example.id}"
    return tokenize_conversation(example.questions, inputs, prompt, max_length, name, example.context)


def tokenization_identity(
    examples: Sequence[Example], prompt: Prompt, length: Callable[[ImageRef], int], max_length: int
) -> str:
    """Returns a digest that identifies encoded examples in one process: their tokens, ids and image paths."""
    digest = hashlib.sha256(_digest(examples, prompt, length, max_length).encode())
    for example in examples:
        digest.update(f"{example.source}\0{example.id}\0{[str(image.path) for image in example.images]}\0".encode())
    return digest.hexdigest()


def tokenized_examples(
    examples: Sequence[Example],
    prompt: Prompt,
    length: Callable[[ImageRef], int],
    max_length: int,
    cache: Path | None = None,
) -> TokenizedDataset:
    """Returns tokenized examples, encoded now or by an earlier call in any process.

    Args:
        examples: Examples to encode.
        prompt: Prompt format.
        length: Number of features of an image.
        max_length: Maximum length of a sequence, in tokens; examples that do not fit are left out.
        cache: Folder of the files; by default in the user's cache folder.

    Raises:
        DataError: If the files cannot be written.
    """
    folder = (cache or cache_folder() / "encoded") / _digest(examples, prompt, length, max_length)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                part = folder.with_suffix(".part")
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                _write(part, examples, prompt, length, max_length)
                part.rename(folder)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written: {error.strerror}", "make room, or set XDG_CACHE_HOME to another folder"
        ) from error
    return TokenizedDataset(folder, examples)


def _digest(examples: Sequence[Example], prompt: Prompt, length: Callable[[ImageRef], int], max_length: int) -> str:
    """Digest of everything that determines the tokens: rows, tokenizer, prompt style, length, features per image."""
    digest = hashlib.sha256(f"{FORMAT}\0{prompt.digest}\0{max_length}\0".encode())
    for example in examples:
        digest.update(f"{[length(image) for image in example.images]}\0".encode())
        if example.context:
            digest.update(f"{example.context}\0".encode())
        for turn in example.turns:
            digest.update(f"{turn.question}\0{turn.answer}\0".encode())
    return digest.hexdigest()[:32]


def _write(
    folder: Path, examples: Sequence[Example], prompt: Prompt, length: Callable[[ImageRef], int], max_length: int
) -> None:
    from tqdm.auto import tqdm

    kept, left_out = [], []
    spans: list[tuple[int, int, int]] = []
    starts, span_starts = [0], [0]
    bar = tqdm(examples, desc="tokens", unit="row", leave=False, disable=len(examples) < 1000)
    with (
        append_array(folder / "ids.npy", np.int32) as add_ids,
        append_array(folder / "supervised.npy", np.bool_) as add_flags,
    ):
        for i, example in enumerate(bar):
            sample = tokenize_example(example, prompt, length, max_length)
            if sample is None:
                left_out.append(i)
                continue
            add_ids(sample.input_ids)
            add_flags(sample.supervised)
            kept.append(i)
            left = list(range(len(example.images)))[len(example.images) - len(sample.spans) :]
            spans += [(image, span.start, span.length) for image, span in zip(left, sample.spans, strict=True)]
            starts.append(starts[-1] + len(sample))
            span_starts.append(len(spans))
    arrays = {
        "starts": np.asarray(starts, np.int64),
        "examples": np.asarray(kept, np.int64),
        "spans": np.asarray(spans, np.int64).reshape(-1, 3),
        "span_starts": np.asarray(span_starts, np.int64),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "left_out.json").write_text(json.dumps(left_out))


@contextlib.contextmanager
def append_array(path: Path, dtype: npt.DTypeLike) -> Iterator[Callable[[npt.NDArray[Any]], object]]:
    """Write a one-dimensional ``.npy`` file piece by piece, so that it need not fit in memory.

    Args:
        path: Path of the file, which is complete when the block ends.
        dtype: Data type of its values.

    Returns:
        Function that appends an array of the same type.
    """
    raw = path.with_suffix(".raw")
    with raw.open("wb") as file:
        yield lambda array: file.write(array.tobytes())
    count = raw.stat().st_size // np.dtype(dtype).itemsize
    with raw.open("rb") as source, path.open("wb") as target:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(target, header)
        shutil.copyfileobj(source, target, 2**20)
    raw.unlink()


def count_left_out(
    sequences: TokenizedDataset, examples: Sequence[Example], max_length: int, report: ReadReport
) -> None:
    """Count the examples without a sequence as dropped."""
    for index in sequences.left_out:
        example = examples[index]
        report.drop_kept(example.source, example.id, f"over {max_length} tokens")
