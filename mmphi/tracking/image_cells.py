"""Pictures for MLflow's pages: thumbnails in table cells, and a grid of pictures with captions."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from mmphi.data.images import open_image
from mmphi.errors import ImageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE, GRID = 256, 12  # Maximum side of a thumbnail in pixels; maximum number of pictures in a grid.
MARKS = {"yes": "#1a7f37", "no": "#b42318"}  # Text colours of correct and wrong predictions.


def thumbnail(path: Any) -> Image.Image | None:
    """Returns a picture of at most 256 px from a file or bytes; ``None`` if empty or unreadable."""
    if not path:
        return None
    try:
        picture = open_image(path if isinstance(path, bytes) else Path(path))
    except ImageError:
        return None
    picture.thumbnail((SIDE, SIDE))
    return picture


def image_cell(path: Any, folder: Path, table: str) -> dict[str, str] | str:
    """Write a picture below ``folder`` and return the table cell that refers to it; empty if it cannot be read.

    Identical pictures of a table are written once.
    """
    picture = thumbnail(path)
    if picture is None:
        return ""
    name = f"table_images/{table}/{hashlib.sha256(picture.tobytes()).hexdigest()[:16]}"
    if not (folder / f"{name}.png").exists():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{name}.png")
        picture.save(folder / f"{name}.webp")
    return {"type": "image", "filepath": f"{name}.png", "compressed_filepath": f"{name}.webp"}


def image_grid(rows: Sequence[Mapping[str, Any]], image: str) -> Figure | None:
    """Draws the pictures of a table's first 12 rows with the row's texts; ``None`` if they have no pictures.

    Args:
        rows: Rows of the table.
        image: Column with the image paths.
    """
    from matplotlib.figure import Figure

    shown = [(picture, row) for row in rows[:GRID] if (picture := thumbnail(row[image])) is not None]
    if not shown:
        return None
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(3.6 * columns, 4.6 * lines), layout="constrained")
    for axes, (picture, row) in zip(figure.subplots(lines, columns, squeeze=False).flat, shown, strict=False):
        axes.imshow(picture)
        correct = row.get("correct", "")
        texts = [(k, str(v)) for k, v in row.items() if k not in (image, "correct") and isinstance(v, str) and v]
        caption = "\n".join(textwrap.fill(f"{k}: {v}", 42, max_lines=4) for k, v in texts)
        # Unescaped dollar signs would start a formula.
        colour = MARKS.get(str(correct), "black")
        escaped = caption.replace("$", r"\$")
        axes.set_title(escaped, fontsize=8, loc="left", y=-0.02, verticalalignment="top", color=colour)
        if correct == "no":
            axes.text(0.97, 0.03, "wrong", transform=axes.transAxes, ha="right", color="white", backgroundcolor=colour)
    for axes in figure.axes:
        axes.axis("off")
    return figure
