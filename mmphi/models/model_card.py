"""Model card that is written with every model: description, loading code, metrics, and lineage."""

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

model = mmphi.load("FOLDER")  # or the run {run_id}, with access to the tracking store
print(model.ask({example}))
```

{questions}## Figures

{figures}

## Components

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
        folder: Model folder.
        title: Heading.
        what: Description in one or two sentences.
        base: Name or folder of the language model.
        example: Arguments of ``ask``, as code.
        run_id: ID of the run that produced the model; may be empty.
        figures: Measured values by name.
        parts: Components and settings by name.
        lineage: IDs of the upstream runs, by stage.
        questions: Most frequent questions in training.
    """
    listed = "".join(f"- {question}\n" for question in questions)
    text = TEMPLATE.format(
        # `base_model` has to be a hub name; local folders and stages of mmphi are not.
        base_model=f"base_model: {base}\n" if HUB_NAME.fullmatch(base) and not Path(base).exists() else "",
        questions=f"## Questions in training\n\nThe most frequent ones; others are untested.\n\n{listed}\n"
        * bool(listed),
        title=title,
        what=what,
        run_id=run_id or "that produced the model",
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
    """Title of a language model: the last part of its hub name or folder.

    Args:
        model: Value of the setting ``language.model``.
    """
    return "A Phi trained from scratch" if model == "pretrain" else Path(model).name


def language_part(model: str) -> str:
    """Value of the language model's row in the card's table."""
    return "trained from scratch by the stage `pretrain`" if model == "pretrain" else model


def shape_text(config: Any) -> str:
    """Fields of a dataclass in one line, such as ``layers 2, width 512, activation gelu``, except ``unused`` ones."""
    names = [each.name for each in fields(config) if each.name not in getattr(config, "unused", ())]
    return ", ".join(f"{name} {str(getattr(config, name)).lower()}" for name in names)
