"""What a stage may record in its run; light to import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """The run that a stage records in; every method is safe to call from the main process only."""

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

    def checkpoint(self, folder: Path) -> None:
        """Send a complete checkpoint to a remote store, in place of the one sent before."""

    def say(self, line: str) -> None:
        """Print a line for the person at the terminal without tearing a progress bar."""


class PrefixedTracker:
    """Records in a run under names of its own: a training before the one that the run is about.

    Args:
        tracker: The run.
        prefix: Stands before the names of metrics, tables and figures.
    """

    def __init__(self, tracker: Tracker, prefix: str) -> None:
        self.tracker, self.prefix = tracker, prefix
        self.run_id = tracker.run_id

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record numbers at a step, as ``prefix/name``."""
        self.tracker.metrics({f"{self.prefix}/{name}": value for name, value in values.items()}, step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], image: str = "") -> None:
        """Record rows as a table called ``prefix_name``."""
        self.tracker.table(f"{self.prefix}_{name}", rows, image)

    def figure(self, name: str, figure: Any) -> None:
        """Record a figure called ``prefix_name``."""
        self.tracker.figure(f"{self.prefix}_{name}", figure)

    def text(self, name: str, content: str) -> None:
        """Record a text file."""
        self.tracker.text(f"{self.prefix}_{name}", content)

    def tags(self, values: Mapping[str, str]) -> None:
        """Record tags."""
        self.tracker.tags(values)

    def checkpoint(self, folder: Path) -> None:
        """Do nothing: only checkpoints of the training that the run is about are shared."""

    def say(self, line: str) -> None:
        """Print a line for the person at the terminal."""
        self.tracker.say(line)


class SilentTracker:
    """Records nothing: for all but the first of the processes that train together, and for models used outside runs."""

    run_id = ""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Do nothing."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], image: str = "") -> None:
        """Do nothing."""

    def figure(self, name: str, figure: Any) -> None:
        """Do nothing."""

    def text(self, name: str, content: str) -> None:
        """Do nothing."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Do nothing."""

    def checkpoint(self, folder: Path) -> None:
        """Do nothing."""

    def say(self, line: str) -> None:
        """Do nothing."""
