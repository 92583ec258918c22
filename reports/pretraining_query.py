"""Loads pretrainings from the tracking store: loss curves, milestones, settings and hardware."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmphi.config.former_names import current_metrics, with_current_names
from mmphi.errors import SettingsError
from mmphi.tracking.run_tracker import params_of
from reports.scaling import Curve, Schedule

if TYPE_CHECKING:
    from mlflow.entities import Run

    from mmphi.tracking.run_store import RunStore

SPLITS = ("train", "valid", "test")
REUSES = "mmphi.reuses"
LOSS, PUBLIC, HELD = "train/step_loss", "public/loss", "val/loss"
MARK = "pretrain/initial_loss"  # Metric of every pretraining on a corpus, and of none on scenes.


@dataclass(frozen=True)
class Pretraining:
    """A run of the stage ``pretrain`` on a corpus.

    Attributes:
        run_id: Id of the MLflow run.
        metrics: Last value of each metric.
        params: Settings by dotted name.
        tags: Tags of the MLflow run.
        losses: Update, from 1, and loss of its batch before that update, in nats per token.
        public: Update and loss on the public text, in nats per token.
        held: Update and loss on held-out text, in nats per token.
        samples: Generated samples, newest last.
        link: URL of the run in MLflow.
    """

    run_id: str
    metrics: Mapping[str, float]
    params: Mapping[str, str]
    tags: Mapping[str, str]
    losses: Sequence[tuple[int, float]]
    public: Sequence[tuple[int, float]] = ()
    held: Sequence[tuple[int, float]] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    link: str = ""

    @property
    def batch_tokens(self) -> int:
        """Tokens per update."""
        return int(self.params["pretrain.batch_tokens"])

    @property
    def initial(self) -> float:
        """Initial loss, in nats per token."""
        return self.metrics.get(MARK, self.losses[0][1] if self.losses else math.nan)

    @property
    def floor(self) -> float | None:
        """Loss of the generators on their own held-out text, in nats per token; ``None`` if it was not measured."""
        return self.metrics.get("floor/loss") if self.held else None

    @property
    def tokens(self) -> float:
        """Number of training tokens."""
        return self.metrics.get("pretrain/tokens", (self.losses[-1][0] if self.losses else 0) * self.batch_tokens)

    @property
    def seconds(self) -> float:
        """Training time in seconds, without validations and checkpoints."""
        return self.metrics.get("pretrain/seconds", self.metrics.get("train/seconds", math.nan))

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second over the whole training."""
        return self.tokens / self.seconds if self.seconds else math.nan

    @property
    def title(self) -> str:
        """Title in reports: size of the model and the first characters of the run id."""
        size = self.params.get("pretrain.size", "custom")
        if size == "custom":
            size = f"{self.metrics.get('pretrain/parameters', math.nan) / 1e6:.3g}M"
        return f"the {size} Phi of run {self.run_id[:6]}"

    def scored_on(self, text: str) -> bool:
        """Whether the public text is the named one, judged by the names of its file and folder.

        If ``text`` is a split (``WikiText-2 (raw, test split)``), the file name must contain the name of that split.
        """
        *_, folder, file = ["", "", *self.params.get("pretrain.eval_text", "").lower().split("/")]
        name, here = (re.sub(r"[^a-z0-9]", "", part) for part in (text.partition(" ")[0].lower(), f"{folder}{file}"))
        split = next((split for split in SPLITS if f"{split} split" in text), "")
        return "public/loss" in self.metrics and name in here and split in file

    @property
    def schedule(self) -> Schedule:
        """Learning rate schedule."""
        steps = self.metrics.get("pretrain/schedule_steps", self.params.get("pretrain.steps", 1000))
        warmup, decay = float(self.params["pretrain.warmup_ratio"]), float(self.params.get("pretrain.decay", 0))
        return Schedule(self.params["pretrain.lr_scheduler"], warmup, decay, int(float(steps)))

    def curve(self) -> Curve:
        """Training loss curve for :class:`reports.scaling.Outlook`."""
        steps, losses = zip(*self.losses, strict=True) if self.losses else ((), ())
        return Curve(steps, losses, self.batch_tokens, self.schedule, self.initial)

    def reached(self, name: str) -> tuple[float, float, float] | None:
        """Tokens, seconds and updates at which a milestone was reached; ``None`` if it was not."""
        of, tokens, seconds, steps = (
            self.metrics,
            *(f"reached/{name}/{what}" for what in ("tokens", "seconds", "steps")),
        )
        return (of[tokens], of[seconds], of[steps]) if tokens in of else None


def load_pretrainings(store: RunStore, chosen: Sequence[str] = ()) -> list[Pretraining]:
    """Load pretrainings from the store.

    Args:
        store: Tracking store.
        chosen: Run ids or prefixes of them; empty for the newest finished run, ``all`` for all finished runs.

    Raises:
        SettingsError: If a run does not exist or is ambiguous, no run is finished, or the store has no pretraining on a
            corpus.
    """
    there = [r for r in store.search(stage="pretrain") if MARK in r.data.metrics or LOSS in r.data.metrics]
    # A run of `mlflow run` that reuses an earlier result refers to the earlier run, and has no curve itself.
    pointing = {str(r.info.run_id): r.data.tags[REUSES] for r in there if REUSES in r.data.tags}
    runs = [r for r in there if str(r.info.run_id) not in pointing]
    chosen = list(dict.fromkeys(_original_of(name, pointing) for name in chosen))
    finished = [r for r in runs if r.info.status == "FINISHED" and MARK in r.data.metrics]
    if not runs:
        raise SettingsError(f"{store.uri} has no pretraining on a corpus", "mmphi pretrain --preset text --corpus FILE")
    if list(chosen) == ["all"]:
        found = finished[::-1]
    elif chosen:
        found = [_one(runs, name) for name in chosen]
    elif finished:
        found = [max(finished, key=lambda run: run.info.start_time)]
    else:
        raise SettingsError("no pretraining has finished yet", f"name one: --runs {runs[0].info.run_id}")
    return [_pretraining(store, run) for run in found]


def _original_of(name: str, pointing: Mapping[str, str]) -> str:
    """Id of the run that a reusing run refers to; other names are returned unchanged."""
    return next((target for run_id, target in pointing.items() if run_id.startswith(name)), name)


def _one(runs: Sequence[Run], name: str) -> Run:
    found = [run for run in runs if run.info.run_id.startswith(name)]
    if len(found) == 1:
        return found[0]
    there = ", ".join(run.info.run_id[:8] for run in runs[:8])
    raise SettingsError(f"{len(found)} pretrainings on a corpus begin with {name!r}", f"there are {there}")


def _pretraining(store: RunStore, run: Run) -> Pretraining:
    def history(name: str) -> list[tuple[int, float]]:
        if name not in run.data.metrics:
            return []
        values = {m.step: m.value for m in store.client.get_metric_history(run.info.run_id, name)}
        return sorted(values.items())

    base = store.pages
    return Pretraining(
        run_id=str(run.info.run_id),
        metrics=current_metrics(run.data.metrics),
        params=with_current_names(params_of(run)),
        tags=run.data.tags,
        losses=history(LOSS),
        public=[(step, value) for step, value in history(PUBLIC) if step],
        held=[(step, value) for step, value in history(HELD) if step],
        samples=_samples(store, run),
        link=f"{base.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}",
    )


def _samples(store: RunStore, run: Run) -> list[dict[str, Any]]:
    table = store.json_of(run, "samples.json")
    return [dict(zip(table["columns"], row, strict=True)) for row in table.get("data", ())]
