"""Image features read from disk per second: mmphi's feature store compared with other formats for the same rows.

``numpy`` is one ``.npy`` file, opened with ``mmap_mode="r"`` and indexed by row number. It has no names and no checks,
so it is the lower bound of the cost of reading.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmphi.data.content_hash import FileDigests
from mmphi.data.feature_writer import FeatureWriter
from mmphi.data.features import FeatureStore
from mmphi.data.schema import ImageRef

Reader = Callable[[list[int]], torch.Tensor]


class Names(FileDigests):
    """Names instead of digests, because there are no image files here; prepared like those of a dataset.

    Args:
        names: Name of each path.
    """

    def __init__(self, names: dict[Path, str]) -> None:
        super().__init__()
        self._prepared = names


def stored(folder: Path, rows: torch.Tensor) -> Reader:
    """The memory-mapped store of the ``embed`` stage."""
    count, tokens, width = rows.shape
    writer = FeatureWriter(folder, tokens, width, shard_images=4096)
    writer.reserve(count)
    for first in range(0, count, 256):
        writer.write({str(i): rows[i] for i in range(first, min(count, first + 256))}, {})
    writer.finish()
    images = [ImageRef(str(i), Path(str(i))) for i in range(count)]  # Built once, as in a dataset.
    store = FeatureStore(folder, Names({image.path: image.id for image in images}))
    return lambda index: store.get([images[i] for i in index])


def numpy_file(folder: Path, rows: torch.Tensor) -> Reader:
    """One memory-mapped array, indexed by row number."""
    folder.mkdir()
    np.save(folder / "rows.npy", rows.numpy())
    opened = np.load(folder / "rows.npy", mmap_mode="r")
    return lambda index: torch.from_numpy(np.asarray(opened[index]))


def safetensors_file(folder: Path, rows: torch.Tensor) -> Reader:
    """One safetensors file with a tensor for every image."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({str(i): row.clone() for i, row in enumerate(rows)}, folder / "rows.safetensors")
    opened: Any = safe_open(folder / "rows.safetensors", "pt")
    return lambda index: torch.stack([opened.get_tensor(str(i)) for i in index])


def arrow_table(folder: Path, rows: torch.Tensor) -> Reader:
    """A Hugging Face dataset (Arrow), formatted as numpy."""
    import datasets

    features = datasets.Features({"row": datasets.Array2D(tuple(rows.shape[1:]), "float16")})
    table = datasets.Dataset.from_dict({"row": list(rows.numpy())}, features=features)
    table.save_to_disk(folder)
    opened = datasets.load_from_disk(folder).with_format("numpy")
    return lambda index: torch.from_numpy(np.stack(opened[index]["row"]))


WAYS: dict[str, Callable[[Path, torch.Tensor], Reader]] = {
    "mmphi": stored,
    "numpy": numpy_file,
    "safetensors": safetensors_file,
    "arrow": arrow_table,
}


def main(arguments: list[str]) -> int:
    """Run ``mmphi benchmark features``."""
    parser = argparse.ArgumentParser(prog="mmphi benchmark features", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4000, help="images [4000]")
    parser.add_argument("--tokens", type=int, default=50, help="features of an image [50]")
    parser.add_argument("--width", type=int, default=768, help="width of a feature [768]")
    parser.add_argument("--batches", type=int, default=20, help="random batches of 64 a round [20]")
    parser.add_argument("--rounds", type=int, default=3, help="how often all are measured, in turn [3]")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    rows = torch.randn(options.rows, options.tokens, options.width, generator=torch.Generator().manual_seed(0)).half()
    rng = np.random.default_rng(0)
    rates_of: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        readers = {name: way(Path(folder) / name, rows) for name, way in WAYS.items()}
        for _ in range(options.rounds):
            batches = [rng.integers(0, options.rows, 64).tolist() for _ in range(options.batches)]
            for name, read in readers.items():
                if not torch.equal(read(batches[0]), rows[batches[0]]):
                    raise RuntimeError(f"{name} reads other numbers than were written")
                begun = time.perf_counter()
                for batch in batches:
                    read(batch)
                rates_of[name].append(64 * options.batches / (time.perf_counter() - begun))
    print(f"{options.rows} x {options.tokens} x {options.width} fp16, random batches of 64, page cache warm")
    for name, rates in rates_of.items():
        ratios = ", ".join(f"{ours / r:.2f}" for ours, r in zip(rates_of["mmphi"], rates, strict=True))
        print(f"{name:<12}{sorted(rates)[len(rates) // 2]:>10.0f} rows/s   mmphi over it: {ratios}")
    if options.json:
        options.json.write_text(json.dumps(rates_of, indent=1))
    return 0
