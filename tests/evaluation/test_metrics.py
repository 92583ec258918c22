"""The table of metrics is complete, documented, and all that a new caption metric needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmphi.config.former_names import FORMER_METRICS
from mmphi.evaluation import metrics
from mmphi.evaluation.captioning import bleu4, cider
from mmphi.evaluation.metrics import CAPTION_METRICS, METRICS, Metric, caption_scores, documented

ROOT = Path(__file__).resolve().parents[2]


def test_every_recorded_result_is_in_the_table() -> None:
    """The metrics that tests/test_compatibility.py compares; recall of a CLIP and answers to text have other tables."""
    surfaces = json.loads((ROOT / "tests" / "golden" / "surfaces.json").read_text())
    recorded = {name for stage in ("evaluate", "projector", "qlora") for name in surfaces[stage]["metrics"]}
    assert [name for name in sorted(recorded) if name.startswith(("test/", "val/")) and not documented(name)] == []
    assert documented("test/loss/caption") == "loss"
    assert documented("test/nothing") == ""


def test_the_page_names_every_metric_with_its_unit_and_direction() -> None:
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    rows = [f"| `{name}` | {m.unit} | {m.better or '-'} | {m.meaning} |" for name, m in METRICS.items()]
    assert [row for row in rows if row not in page] == []


def test_former_names_of_metrics_name_current_ones() -> None:
    assert set(FORMER_METRICS.values()) <= set(METRICS)
    assert not set(FORMER_METRICS) & set(METRICS)


def test_a_new_caption_metric_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    said, right = ["a red circle"], [["a red circle", "a circle"]]
    before = caption_scores(said, right)
    assert before == {"cider": cider(said, right), "bleu4": bleu4(said, right)} | before

    def length(predictions: object, references: object) -> float:
        return 7.0

    monkeypatch.setattr(metrics, "CAPTION_METRICS", {**CAPTION_METRICS, "length": Metric("words", "", "words", length)})
    assert caption_scores(said, right) == {**before, "length": 7.0}
