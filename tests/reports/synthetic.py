"""Studies written straight into a tracking store: what a report reads, without any training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.entities import Metric, Param, RunTag

from mmphi.tracking.run_writer import TrackingStore

DECLARED: dict[str, Any] = {
    "question": "How many layers?",
    "factor": "projector.layers",
    "levels": {"2 layers": 2, "3 layers": 3, "odd | one": 4},
    "baseline": "2 layers",
    "fields": [],
    "preset": "tiny",
    "stage": "projector",
    "fixed": {"projector.optimizer": "adamw"},
    "nuisance": {},
    "tuning_metric": "val/loss",
    "tokens": 1000,
    "seeds": 8,
    "seed_settings": ["projector.seed"],
    "metric": "test/loss",
    "unit": "nats/token",
    "direction": "minimize",
    "margin": 0.02,
    "costs": {"projector/parameters": "parameters", "cost/first_token_s": "seconds to the first token"},
}


def values(effects: Mapping[str, float], seeds: int = 8, noise: float = 0.004) -> dict[str, dict[int, float]]:
    """Losses by level and seed: seeds move all levels alike."""
    rng = np.random.default_rng(0)
    shared = rng.normal(1.0, 0.05, seeds)
    drawn = {level: shared + by + rng.normal(0, noise, seeds) for level, by in effects.items()}
    return {level: dict(enumerate(of.tolist())) for level, of in drawn.items()}


def record(name: str, **changes: Any) -> str:
    """The record of a study; returns its run."""
    store = TrackingStore()
    tracker = store.begin(f"study {name}", {"mmphi.study_record": name})
    tracker.text("study.json", json.dumps(DECLARED | changes))
    store.client.set_terminated(tracker.run_id, "FINISHED")
    return tracker.run_id


def trial(name: str, level: str, seed: int, metrics: Mapping[str, float], **given: Any) -> str:
    """A run of a study; ``status``, ``phase``, ``params``, ``tags``, ``curve`` and ``started`` may be given."""
    store = TrackingStore()
    tags = {
        "mmphi.study": name,
        "mmphi.level": level,
        "mmphi.round": str(seed),
        "mmphi.phase": given.get("phase", "verdict"),
        "mmphi.git_commit": "0123456789abcdef",
        **given.get("tags", {}),
    }
    start = 1_700_000_000_000 + given.get("started", seed) * 60_000
    run = store.client.create_run(store.experiment(), start_time=start, tags=tags)
    run_id = run.info.run_id
    curve = [Metric("val/loss", value, start, step) for step, value in given.get("curve", {}).items()]
    store.client.log_batch(
        run_id,
        metrics=[*curve, *(Metric(name, value, start, 0) for name, value in metrics.items())],
        params=[Param(k, str(v)) for k, v in given.get("params", {}).items()],
        tags=[RunTag(k, v) for k, v in tags.items()],
    )
    store.client.set_terminated(run_id, given.get("status", "FINISHED"), end_time=start + 30_000)
    return str(run_id)


def study(name: str, effects: Mapping[str, float], seeds: int = 8, **changes: Any) -> dict[str, dict[int, float]]:
    """A whole study in the store; returns what it holds."""
    record(name, seeds=seeds, **changes)
    found = values(effects, seeds)
    for level, of in found.items():
        layers = DECLARED["levels"].get(level, 9)
        for seed, value in of.items():
            costs = {"projector/parameters": 1e5 * layers, "cost/first_token_s": 0.01 * layers}
            metrics = {"test/loss": value, "seconds": 30.0, "projector/supervised_tokens": 1000.0, **costs}
            trial(name, level, seed, metrics, curve={50: 2 * value, 75: 1.4 * value, 100: value})
    return found


def read(folder: Path) -> str:
    """The markdown of a report."""
    return (folder / "report.md").read_text()
