"""A custom reader: any iterable of rows is a data set.

python examples/own_reader.py MODEL FOLDER      a folder of mmphi with an open_clip encoder, and a folder of images

The file names are the captions: the caption of `red-square_01.png` is "red square".
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import mmphi


def rows(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.glob("*.png")):
        yield path, re.sub(r"_\d+$", "", path.stem).replace("-", " ")


def main(model: str, folder: str) -> None:
    joined = mmphi.load(model)
    data = list(rows(Path(folder)))
    held_out = data[::5]
    before = joined.loss(held_out)
    joined.fit([row for row in data if row not in held_out], steps=20, batch_size=4, learning_rate=1e-3)
    print(f"held-out loss {before:.3f} before, {joined.loss(held_out):.3f} after, in nats per token")


if __name__ == "__main__":
    main(*sys.argv[1:])
