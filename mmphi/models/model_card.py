"""The model card that is written with every model: what it is, how to load it, its figures, where it came from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

CARD = "README.md"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

TEMPLATE = """---
library_name: mmphi
{base_model}---

# {title}

{what}

```python
import mmphi

model = mmphi.load("FOLDER")  # this folder, or the run {run_id} where its store is in reach
print(model.ask({example}))
```

{questions}## Figures

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
    questions: Sequence[str] = (),
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
        questions: What its training asked most often.
    """
    listed = "".join(f"- {question}\n" for question in questions)
    text = TEMPLATE.format(
        # Only a name on the hub is a base model to others; a folder of this machine or a stage of mmphi is none.
        base_model=f"base_model: {base}\n" if HUB_NAME.fullmatch(base) and not Path(base).exists() else "",
        questions=f"## Questions in training\n\nThe most frequent ones; others are untested.\n\n{listed}\n"
        * bool(listed),
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


def language_title(model: str) -> str:
    """What a language model is called in a heading: the last part of its name or folder.

    Args:
        model: As ``language.model`` has it.
    """
    return "A Phi trained from scratch" if model == "pretrain" else Path(model).name


def language_part(model: str) -> str:
    """A language model as a row of the card's table has it."""
    return "trained from scratch by the stage `pretrain`" if model == "pretrain" else model


def shape_text(config: Any) -> str:
    """The fields of a dataclass in a line, such as ``layers 2, width 512, activation gelu``."""
    names = [each.name for each in fields(config) if each.name not in getattr(config, "unused", ())]
    return ", ".join(f"{name} {str(getattr(config, name)).lower()}" for name in names)
