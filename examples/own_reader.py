"""A custom reader: rows of any format as a source that is counted, split by image and mixed like the others.

python examples/own_reader.py MODEL FOLDER      a folder of mmphi with an open_clip encoder, and a folder of images

The file names are the captions: the caption of `red-square_01.png` is "red square". Rows that are in memory already
need no reader: `fit` takes any iterable of them.
"""

import re
import sys
from collections.abc import Iterator

import mmphi
from mmphi.config import DataSettings
from mmphi.data.dataset_builder import read_examples
from mmphi.data.images import ImageFolder
from mmphi.data.readers import Reader, Source, register
from mmphi.data.schema import Example, Turn


def read_file_names(source: Source) -> Iterator[Example]:
    folder = ImageFolder(source.images, source.name)
    for path in sorted(source.images.glob("*.png")):
        caption = re.sub(r"_\d+$", "", path.stem).replace("-", " ").strip()
        if not caption:
            source.report.drop(source.name, path.name, "no caption in the file name")
            continue
        source.report.keep(source.name)
        turn = Turn(source.settings.question, caption)
        yield Example(path.stem, (folder.find(path.name),), (turn,), source.name)


FILE_NAMES = Reader(
    read_file_names,
    "images that are named by their captions",
    "none: PNG files in the folder `images`",
    required=("images",),
    optional=("question",),
)


def main(model: str, folder: str) -> None:
    register("file_names", FILE_NAMES)
    source = {"kind": "file_names", "images": folder}  # Of several sources, `read_examples` reads the mixture.
    data = DataSettings.model_validate({"sources": [source], "validation_images": 0, "test_images": 2})
    examples, report = read_examples(data, None)
    joined = mmphi.load(model)
    held_out = [example for example in examples if example.split == "test"]
    before = joined.loss(held_out)
    training = [example for example in examples if example.split == "train"]
    joined.fit(training, steps=20, batch_size=4, learning_rate=1e-3)
    print(f"held-out loss {before:.3f} before, {joined.loss(held_out):.3f} after, in nats per token")
    print(report.table())


if __name__ == "__main__":
    main(*sys.argv[1:])
