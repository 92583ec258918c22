"""The run that a stage records in."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.entities import Metric, Param, RunTag

from mmphi.logs import LOGGER
from mmphi.tracking.artifacts import remove_artifacts
from mmphi.tracking.image_cells import image_cell, image_grid
from mmphi.tracking.tables import Tables, json_row

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

RESOLVED = "resolved."  # Before the name of a parameter whose value `mlflow run` has recorded as it was typed.
Watch = Callable[[Mapping[str, float], int], None]
EVERY_S, AT_MOST = 1.0, 500  # Metrics are sent together, at most this much later and this many.
TAG_CHARACTERS, PARAM_CHARACTERS = 5000, 6000  # MLflow's own limits.


def params_of(run: Run) -> dict[str, str]:
    """The parameters of a run, with settings as they were resolved, however they were typed."""
    params = dict(run.data.params)
    resolved = {name.removeprefix(RESOLVED): text for name, text in params.items() if name.startswith(RESOLVED)}
    return {name: text for name, text in params.items() if not name.startswith(RESOLVED)} | resolved


class RunTracker:
    """Records in one run; fulfils :class:`mmphi.tracking.tracker.Tracker`.

    Whatever is recorded as a file is written to ``folder``; where that is not the run's own artifact folder, it is sent
    there as well.

    Args:
        client: Speaks with the store.
        run_id: Id of the run.
        folder: The run's artifact folder, or a folder of this machine that stands for it.
        remote: Whether it only stands for it.
    """

    def __init__(self, client: MlflowClient, run_id: str, folder: Path, *, remote: bool) -> None:
        self.client, self._run_id, self.folder, self.remote = client, run_id, folder, remote
        self._waiting: list[Metric] = []
        self._sent = time.monotonic()
        self._tables = Tables(folder)
        self._not_finite: list[str] = []
        self._checkpoint = ""
        self._last: dict[str, tuple[int, float]] = {}  # Step and value of each metric's last point.
        self.watch: Watch | None = None

    @property
    def run_id(self) -> str:
        """Id of the run."""
        return self._run_id

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record numbers at a step; one that is not finite becomes a tag, because no chart can show it.

        Whoever watches the run is told, and may raise to end it.
        """
        if self.watch:
            self.watch(values, step)
        now = int(time.time() * 1000)
        for name, value in values.items():
            if math.isfinite(value):
                if step >= self._last.get(name, (0, 0.0))[0]:
                    self._last[name] = step, float(value)
                self._waiting.append(Metric(name, float(value), now, step))
            else:
                self._not_finite.append(f"{name} = {value} at step {step}")
                self.tags({"mmphi.not_finite": "; ".join(self._not_finite)})
        if len(self._waiting) >= AT_MOST or time.monotonic() - self._sent > EVERY_S:
            self.flush()

    def final_metrics(self, values: Mapping[str, float]) -> None:
        """Record a run's final numbers, each at the last step of its curve; a curve gets no point at step 0."""
        by_step: dict[int, dict[str, float]] = {}
        for name, value in values.items():
            step, last = self._last.get(name, (0, None))
            if last is None or last != float(value):
                by_step.setdefault(step, {})[name] = value
        time.sleep(0.002)  # Of two points at one step MLflow takes the later one as the last, by the millisecond.
        for step, some in by_step.items():
            self.metrics(some, step)

    def flush(self) -> None:
        """Send the metrics that wait."""
        while self._waiting:
            self.client.log_batch(self._run_id, metrics=self._waiting[:AT_MOST])
            del self._waiting[:AT_MOST]
        self._sent = time.monotonic()

    def params(self, values: Mapping[str, Any]) -> None:
        """Record settings; an empty value is written as ``(none)``, because MLflow refuses it.

        ``mlflow run -P scenes.held_out=2e-1`` has recorded what was typed, and a parameter cannot be changed. Where the
        resolved value is written differently, it is recorded as ``resolved.scenes.held_out``.
        """
        texts = {name: str(value)[:PARAM_CHARACTERS] or "(none)" for name, value in values.items()}
        typed = self.client.get_run(self._run_id).data.params
        entities = [
            Param(name if typed.get(name, text) == text else f"{RESOLVED}{name}", text) for name, text in texts.items()
        ]
        for first in range(0, len(entities), 100):
            self.client.log_batch(self._run_id, params=entities[first : first + 100])

    def tags(self, values: Mapping[str, str]) -> None:
        """Record tags."""
        entities = [RunTag(name, str(value)[:TAG_CHARACTERS]) for name, value in values.items()]
        for first in range(0, len(entities), 100):
            self.client.log_batch(self._run_id, tags=entities[first : first + 100])

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], image: str = "") -> None:
        """Record rows as ``name.json``, the form that MLflow's pages show as a table.

        Rows of later calls follow those of earlier ones. A run that goes on from a dead one's files takes its place in
        them: rows of the same or a later ``step``, and tables without steps, are written again.

        Args:
            name: Of the table.
            rows: Each a mapping from column to value.
            image: Column of image paths; shown as pictures, and drawn as a grid in ``figures/name.png``.
        """
        if not rows:
            return
        fresh = name not in self._tables
        written = [json_row(row) for row in rows]
        if image:
            self._show(name, written, rows, image)
        self._write(f"{name}.json", self._tables.extend(name, written))
        if fresh:
            self._announce(name)

    def _show(self, name: str, written: list[dict[str, Any]], rows: Sequence[Mapping[str, Any]], image: str) -> None:
        """Put pictures into the rows of a table, and draw a grid of them."""
        for row, original in zip(written, rows, strict=True):
            row[image] = image_cell(original[image], self.folder, name)
        for file in {f for row in written if row[image] for f in list(row[image].values())[1:]}:
            self._send(self.folder / file)
        drawn = image_grid(rows, image)
        if drawn:
            self.figure(name, drawn)

    def _announce(self, name: str) -> None:
        """Tell MLflow's pages that there is a table."""
        tag = "mlflow.loggedArtifacts"
        known = json.loads(self.client.get_run(self._run_id).data.tags.get(tag, "[]"))
        self.tags({tag: json.dumps([*known, {"path": f"{name}.json", "type": "table"}])})

    def figure(self, name: str, figure: Any) -> None:
        """Record a matplotlib figure or a PIL image as ``figures/name.png``."""
        path = self.folder / "figures" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        if hasattr(figure, "savefig"):
            figure.savefig(path, dpi=100)
        else:
            figure.save(path)
        self._send(path)

    def text(self, name: str, content: str) -> None:
        """Record a text file."""
        self._write(name, content.encode())

    def checkpoint(self, folder: Path) -> None:
        """Send a complete checkpoint to a remote store, in place of the one before; a local store has it already."""
        if not self.remote:
            return
        self.client.log_artifacts(self._run_id, str(folder), folder.name)
        if self._checkpoint and self._checkpoint != folder.name:
            remove_artifacts(self.client, self._run_id, self._checkpoint)
        self._checkpoint = folder.name

    def say(self, line: str) -> None:
        """Log a line for the person at the terminal."""
        LOGGER.info(line)

    def _write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}")
        part.write_bytes(content)
        part.replace(path)
        self._send(path)

    def _send(self, path: Path) -> None:
        if self.remote:
            folder = path.parent.relative_to(self.folder).as_posix()
            self.client.log_artifact(self._run_id, str(path), None if folder == "." else folder)
