"""Reference data of reports: published and measured losses, Phi-2's training budget, prices, the original run."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mmphi.errors import DataError

FOLDER = Path(__file__).parent / "reference"
PHI2 = "microsoft/phi-2"
WIKITEXT2 = "WikiText-2 (raw, test split)"


@dataclass(frozen=True)
class Reference:
    """The loss of a model on a text.

    Attributes:
        model: Name of the model.
        text: Name of the text.
        protocol: Windows and strides with which the text was scored.
        loss: Loss in nats per token.
        source: URL of a publication, or the command that measured it.
        measured: Whether it was measured with ``mmphi reference``.
    """

    model: str
    text: str
    protocol: str
    loss: float
    source: str
    measured: bool = False


def references(folder: Path = FOLDER) -> list[Reference]:
    """All reference losses; measured ones before published ones.

    Raises:
        DataError: If a file cannot be read or is malformed.
    """
    try:
        published = yaml.safe_load((folder / "losses.yaml").read_text()) or []
        measured = [json.loads(path.read_text()) for path in sorted((folder / "measured").glob("*.json"))]
        return [
            *(_reference(entry, entry["command"], measured=True) for entry in measured),
            *(_reference(entry, entry["source"], measured=False) for entry in published),
        ]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise DataError(f"the references in {folder} cannot be read: {error}", "fix the file there") from error


def _reference(entry: Mapping[str, Any], source: str, *, measured: bool) -> Reference:
    loss = float(entry["loss_nats_per_token"])
    return Reference(entry["model"], entry["text"], entry["protocol"], loss, source, measured)


def reference_of(model: str = PHI2, text: str = WIKITEXT2, folder: Path = FOLDER) -> Reference:
    """Reference loss of a model on a text: the measured one if it exists, else the published one.

    Raises:
        DataError: If neither exists.
    """
    found = next((r for r in references(folder) if (r.model, r.text) == (model, text)), None)
    if found is None:
        raise DataError(f"no reference loss of {model} on {text}", f"mmphi reference --lm {model} --text FILE")
    return found


@cache
def phi2_budget() -> Mapping[str, Any]:
    """Training budget of Phi-2: tokens, FLOPs, GPUs, days and source."""
    loaded: Mapping[str, Any] = yaml.safe_load((FOLDER / "phi2.yaml").read_text())
    return {**loaded, "tokens": float(loaded["tokens"]), "flops": float(loaded["flops"])}


@cache
def prices() -> Mapping[str, Any]:
    """Prices of accelerators in dollars per hour and their bf16 peaks in TFLOP/s, with date and source."""
    loaded: Mapping[str, Any] = yaml.safe_load((FOLDER / "prices.yaml").read_text())
    return loaded


@cache
def original_run() -> Sequence[Mapping[str, float]]:
    """Log of the original run's pretraining, one mapping per row."""
    with (FOLDER / "original_run.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
