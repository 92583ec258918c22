"""What a stage is, what it is given, and what it may say to the tracking store.

A stage is a function: settings and upstream results in, files and metrics out. Everything here is light to import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mmphi.settings import Settings


class Tracker(Protocol):
    """What a stage may record in its run; every method is safe to call from the main process only."""

    @property
    def run_id(self) -> str:
        """Id of the run."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record numbers at a step; names look like ``train/loss``."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], image: str = "") -> None:
        """Record rows as a table; ``image`` names the column that holds image paths, shown as pictures in the UI."""

    def figure(self, name: str, figure: Any) -> None:
        """Record a matplotlib figure (or PIL image) as ``figures/name.png``."""

    def text(self, name: str, content: str) -> None:
        """Record a text file."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Record tags."""

    def say(self, line: str) -> None:
        """Print a line for the person at the terminal without tearing a progress bar."""


@dataclass(frozen=True)
class Result:
    """A finished stage: where its files lie, and the run that is the proof."""

    stage: str
    key: str
    run_id: str
    path: Path
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What a stage's function is given.

    Attributes:
        settings: All settings, validated.
        folder: Where to write. Holds what an interrupted call left: resume from it.
        upstream: Results by stage name, as :attr:`Stage.upstream` asked for them.
        tracker: The run to record in.
    """

    settings: Settings
    folder: Path
    upstream: Mapping[str, Result]
    tracker: Tracker


@dataclass(frozen=True)
class Cost:
    """What a stage would take, estimated before it starts.

    Attributes:
        disk_bytes: Bytes written.
        seconds: Time on this machine; ``None`` where nothing honest can be said.
    """

    disk_bytes: int
    seconds: float | None = None


def _nothing(_: Settings) -> tuple[str, ...]:
    return ()


def _no_files(_: Settings) -> dict[str, Path]:
    return {}


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    Attributes:
        name: ``scenes``, ``projector``, ...
        version: Raised whenever the same settings would give another result.
        help: One line for ``mmphi --help``.
        sections: Settings sections whose values matter to this stage, its own first; ``seed`` always matters.
        run: The work. Imports what is heavy itself. Returns its final metrics.
        upstream: Names of the stages whose results it needs, given the settings.
        inputs: Files and folders from outside that it reads, by dotted setting name (``light_clip.image_weights``);
            their content stands in the key in place of their path.
        cost: Estimate of what running it takes.
    """

    name: str
    version: int
    help: str
    sections: tuple[str, ...]
    run: Callable[[Context], Mapping[str, float]]
    upstream: Callable[[Settings], tuple[str, ...]] = _nothing
    inputs: Callable[[Settings], Mapping[str, Path]] = _no_files
    cost: Callable[[Settings], Cost] = lambda _: Cost(0)
