"""The model card that is written with every model: what it is, how to load it, its figures, where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD = "README.md"

TEMPLATE = """---
library_name: mmphi
base_model: {base}
---

# {title}

{what}

```python
import mmphi

model = mmphi.load("FOLDER")  # this folder, or the run {run_id} where its store is in reach
print(model.ask({example}))
```

## Figures

{figures}

## Joined from

{parts}

## Lineage

{lineage}
"""


def write_card(
    folder: Path,
    *,
    title: str,
    what: str,
    base: str,
    example: str,
    run_id: str,
    figures: Mapping[str, float],
    parts: Mapping[str, Any],
    lineage: Mapping[str, str],
) -> None:
    """Write ``README.md``.

    Args:
        folder: The model's.
        title: Its heading.
        what: What it is, in a sentence or two.
        base: The language model.
        example: Arguments of ``ask``, as code.
        run_id: The run that it came from.
        figures: What was measured of it.
        parts: What it is joined from, and how.
        lineage: Ids of the runs that it is built on, by stage.
    """
    text = TEMPLATE.format(
        base=base,
        title=title,
        what=what,
        run_id=run_id or "that it came from",
        example=example,
        figures=_table(("measured", "value"), {name: f"{value:.4g}" for name, value in figures.items()}),
        parts=_table(("part", "value"), {name: str(value) for name, value in parts.items()}),
        lineage=_table(("stage", "run"), {"this": run_id, **lineage}),
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def _table(heads: tuple[str, str], rows: Mapping[str, str]) -> str:
    if not rows:
        return "None."
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join([f"| {heads[0]} | {heads[1]} |", "|---|---|", *lines])
