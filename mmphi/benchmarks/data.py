"""Time to read and tokenise a file of LLaVA-Instruct-150k's size: 157,712 conversations about 81,000 images.

The rows and image files are generated. The image files are not valid images, because reading does not decode them.
``first read`` computes the digest of every image file; later reads find the digests in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar
from unittest import mock

from mmphi.errors import SettingsError

T = TypeVar("T")
WORDS = ["a", "the", "of", "in", "on", "with", "near", "red", "small", "people", "dog", "street", "stands", "white"]
TURNS, LENGTHS = (1, 2, 3, 4), (5, 150)  # Numbers of turns; shortest and longest answer, in words.


def parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    made = argparse.ArgumentParser(prog="mmphi benchmark data", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--rows", type=int, default=157_712, help="conversations [157712]")
    made.add_argument("--images", type=int, default=81_000, help="image files [81000]")
    made.add_argument("--json", type=Path, help="file for all figures")
    return made


def main(arguments: Sequence[str]) -> int:
    """Run ``mmphi benchmark data``."""
    options = parser().parse_args(list(arguments))
    if not 10 <= options.images <= options.rows:
        raise SettingsError("--images is 10 at least, and at most --rows")
    with tempfile.TemporaryDirectory() as name, mock.patch.dict(os.environ, XDG_CACHE_HOME=f"{name}/cache"):
        found = measured(Path(name), options.rows, options.images)
    print(f"{options.rows:,} rows, {options.images:,} images, {found['tokens']:,.0f} tokens")
    for step in ("first read", "read again", "tokenised"):
        print(f"{step:12} {found[f'{step}, s']:8.1f} s {found[f'{step}, cpu s']:8.1f} s of CPU time")
    print(f"peak memory  {found['memory_gb']:8.2f} GB")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def measured(folder: Path, rows: int, images: int) -> dict[str, float]:
    """Seconds and CPU seconds of each step, number of tokens, and peak memory in GB."""
    from mmphi.config import DataSettings, SourceSettings
    from mmphi.data.dataset_builder import read_examples
    from mmphi.data.tokenized_dataset import tokenized_examples
    from mmphi.text.prompt import Prompt
    from mmphi.text.tokenizer import phi2_tokenizer
    from mmphi.training.throughput import peak_memory_bytes

    generate(folder, rows, images)
    source = SourceSettings(kind="llava", path=str(folder / "rows.json"), images=str(folder / "images"))
    held = min(100, images // 10)
    data = DataSettings(sources=[source], validation_images=held, test_images=held)
    found: dict[str, float] = {}

    def timed(step: str, work: Callable[[], T]) -> T:
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        found[f"{step}, s"] = time.perf_counter() - wall
        found[f"{step}, cpu s"] = time.process_time() - cpu
        return result

    timed("first read", lambda: read_examples(data, None))
    examples, report = timed("read again", lambda: read_examples(data, None))
    if report.dropped or len(examples) != rows:
        raise RuntimeError(f"{len(examples)} of {rows} rows were read")
    prompt = Prompt(phi2_tokenizer(), "phi")
    kept = timed("tokenised", lambda: tokenized_examples(examples, prompt, lambda _: 576, 2048))
    found["tokens"] = float(sum(len(kept[i]) for i in range(0, len(kept), 100)) * 100)
    found["memory_gb"] = peak_memory_bytes() / 1e9
    return found


def generate(folder: Path, rows: int, images: int) -> None:
    """Write the rows, and image files with different contents."""
    draw = random.Random(0)
    (folder / "images").mkdir()
    for number in range(images):
        (folder / "images" / f"{number:012}.jpg").write_bytes(number.to_bytes(8, "big") * 16)
    with (folder / "rows.json").open("w") as file:
        file.write("[")
        for number in range(rows):
            turns = []
            for turn in range(draw.choice(TURNS)):
                question = " ".join(draw.choices(WORDS, k=9)) + "?"
                answer = " ".join(draw.choices(WORDS, k=draw.randint(*LENGTHS)))
                turns += [
                    {"from": "human", "value": "<image>\n" * (not turn) + question},
                    {"from": "gpt", "value": answer},
                ]
            image = f"{number % images:012}.jpg"
            file.write(",\n" * bool(number) + json.dumps({"id": str(number), "image": image, "conversations": turns}))
        file.write("]")
