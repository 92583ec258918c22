"""The interface for recording in a run, and simple implementations; light to import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Records in the run of a stage; call its methods from the main process only."""

    @property
    def run_id(self) -> str:
        """ID of the run."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record metrics at a step, with names such as ``train/loss``."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], image: str = "") -> None:
        """Record rows as a table; ``image`` names the column that holds image paths, shown as pictures in the UI."""

    def figure(self, name: str, figure: Any) -> None:
        """Record a matplotlib figure (or PIL image) as ``figures/name.png``."""

    def text(self, name: str, content: str) -> None:
        """Record a text file."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Record tags."""

    def checkpoint(self, folder: Path) -> None:
        """Upload a complete checkpoint to a remote store, replacing the previous one."""

    def say(self, line: str) -> None:
        """Print a line at the terminal without breaking a progress bar."""


class PrefixedTracker:
    """Records in a run with prefixed names, for a preliminary training such as a warm-up.

    Args:
        tracker: Tracker of the run.
        prefix: Prefix of the names of metrics, tables, figures and text files.
    """

    def __init__(self, tracker: Tracker, prefix: str) -> None:
        self.tracker, self.prefix = tracker, prefix
        self.run_id = tracker.run_id

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record metrics at a step, as ``prefix/name``."""
        self.tracker.metrics({f"{self.prefix}/{name}": value for name, value in values.items()}, step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], image: str = "") -> None:
        """Record rows as the table ``prefix_name``."""
        self.tracker.table(f"{self.prefix}_{name}", rows, image)

    def figure(self, name: str, figure: Any) -> None:
        """Record the figure ``prefix_name``."""
        self.tracker.figure(f"{self.prefix}_{name}", figure)

    def text(self, name: str, content: str) -> None:
        """Record the text file ``prefix_name``."""
        self.tracker.text(f"{self.prefix}_{name}", content)

    def tags(self, values: Mapping[str, str]) -> None:
        """Record tags, without the prefix."""
        self.tracker.tags(values)

    def checkpoint(self, folder: Path) -> None:
        """Do nothing: only checkpoints of the main training are uploaded."""

    def say(self, line: str) -> None:
        """Print a line at the terminal."""
        self.tracker.say(line)


class SilentTracker:
    """Records nothing; used on ranks other than 0 and for models outside runs."""

    run_id = ""

    def metrics(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    table = figure = text = tags = checkpoint = say = metrics
