"""Recording metrics, parameters, tables and files in a run."""

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

RESOLVED = "resolved."  # Prefix of a parameter whose value `mlflow run` has already recorded as the user typed it.
Watch = Callable[[Mapping[str, float], int], None]
EVERY_S, AT_MOST = 1.0, 500  # Metrics are sent in batches: after this delay, and at most this many.
TAG_CHARACTERS, PARAM_CHARACTERS = 5000, 6000  # MLflow's limits.


def params_of(run: Run) -> dict[str, str]:
    """Returns the parameters of a run, with resolved values in place of those typed for `mlflow run`."""
    params = dict(run.data.params)
    resolved = {name.removeprefix(RESOLVED): text for name, text in params.items() if name.startswith(RESOLVED)}
    return {name: text for name, text in params.items() if not name.startswith(RESOLVED)} | resolved


class RunTracker:
    """Records in one run; implements :class:`mmphi.tracking.tracker.Tracker`.

    Files are written to ``folder``. If the store is remote, they are uploaded as well.

    Args:
        client: MLflow client of the store.
        run_id: ID of the run.
        folder: Artifact folder of the run, or a local work folder if the artifacts are remote.
        remote: Whether ``folder`` is only a local work folder.

    Attributes:
        watch: Called with the metrics and step of each :meth:`metrics` call; ``None`` for no callback.
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
        """ID of the run."""
        return self._run_id

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record metrics at a step; non-finite values are recorded in a tag, because charts cannot show them.

        ``watch`` is called first and may raise to end the run.
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
        """Record final metrics, each at the last step of its curve, so that no curve gets a point at step 0."""
        by_step: dict[int, dict[str, float]] = {}
        for name, value in values.items():
            step, last = self._last.get(name, (0, None))
            if last is None or last != float(value):
                by_step.setdefault(step, {})[name] = value
        time.sleep(0.002)  # Of two points at the same step, MLflow uses the one with the later timestamp (ms).
        for step, some in by_step.items():
            self.metrics(some, step)

    def flush(self) -> None:
        """Send all pending metrics."""
        while self._waiting:
            self.client.log_batch(self._run_id, metrics=self._waiting[:AT_MOST])
            del self._waiting[:AT_MOST]
        self._sent = time.monotonic()

    def params(self, values: Mapping[str, Any]) -> None:
        """Record settings as parameters; an empty value becomes ``(none)``, because MLflow rejects empty values.

        ``mlflow run -P scenes.held_out=2e-1`` records the typed text, and parameters cannot be changed. If the text of
        the resolved value differs, it is recorded as ``resolved.scenes.held_out``.
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
        """Record rows as ``name.json``, which MLflow's pages show as a table.

        Later calls append rows. A run resumed from another run's files keeps that run's rows of earlier steps; rows of
        the same or a later ``step``, and tables without steps, are replaced.

        Args:
            name: Name of the table.
            rows: Rows as mappings from column to value.
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
        """Add pictures to the rows of a table, and record a grid of them."""
        for row, original in zip(written, rows, strict=True):
            row[image] = image_cell(original[image], self.folder, name)
        for file in {f for row in written if row[image] for f in list(row[image].values())[1:]}:
            self._send(self.folder / file)
        drawn = image_grid(rows, image)
        if drawn:
            self.figure(name, drawn)

    def _announce(self, name: str) -> None:
        """Register a table in the run's tags, so that MLflow's pages list it."""
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
        """Upload a complete checkpoint to a remote store, replacing the previous one; a local store already has it."""
        if not self.remote:
            return
        self.client.log_artifacts(self._run_id, str(folder), folder.name)
        if self._checkpoint and self._checkpoint != folder.name:
            remove_artifacts(self.client, self._run_id, self._checkpoint)
        self._checkpoint = folder.name

    def say(self, line: str) -> None:
        """Log a line for the user at the terminal."""
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
