from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from mmphi.errors import DataError
from mmphi.serving.harness.command import figures_of, record
from mmphi.tracking.run_store import RunStore
from reports.benchmarks import load_benchmarked, published
from reports.commands import report

RESULTS = {
    "results": {
        "pope": {"alias": "pope", "pope_accuracy,none": 0.812, "pope_accuracy_stderr,none": 0.01, "samples": 500},
        "textvqa_val": {"exact_match,none": 0.4, "exact_match_stderr,none": "N/A"},
    }
}


def test_what_the_harness_says_is_recorded_and_set_beside_what_others_published(
    empty_store: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    figures = figures_of(RESULTS)
    assert figures == {"pope/pope_accuracy": 0.812, "textvqa_val/exact_match": 0.4}
    options = argparse.Namespace(model="a-run", tasks="pope,textvqa_val", limit=500)
    run_id, address = record(options, figures, {"pope": {"original": 9000, "effective": 500}})
    (run,) = load_benchmarked(RunStore())
    assert (run.run_id, run.link, run.figures, run.questions) == (run_id, address, figures, {"pope": 500})
    assert report(["benchmarks", "--out", str(tmp_path / "out")]) == 0
    assert "pope/pope_accuracy 0.812" in capsys.readouterr().out
    lines = (tmp_path / "out" / "report.md").read_text().splitlines()
    (ours,) = [line for line in lines if line.startswith("| [a-run]")]
    assert [cell.strip() for cell in ours.split("|")[2:7]] == ["this store; 500 of pope", "-", "40.0", "81.2", "-"]
    (theirs,) = [line for line in lines if line.startswith("| [LLaVA-Phi](https://arxiv.org/abs/2401.02330)")]
    assert [cell.strip() for cell in theirs.split("|")[3:7]] == ["71.4", "48.6", "85.0", "59.8"]
    assert "mmphi evaluate --harness lmms-eval --tasks pope --model a-run --limit 500" in lines


def test_a_store_without_any_says_what_to_run(empty_store: str) -> None:
    with pytest.raises(DataError, match="no benchmark was run yet\n  mmphi evaluate --harness lmms-eval"):
        load_benchmarked(RunStore())


def test_every_published_figure_has_its_source_and_a_broken_file_is_told(tmp_path: Path) -> None:
    known = published()
    assert all(entry["source"].startswith("https://") for entry in known["published"])
    assert {name for entry in known["published"] for name in entry} - {"model", "what", "source"} == set(known["tasks"])
    (tmp_path / "benchmarks.yaml").write_text("published: [{model: x}]")
    with pytest.raises(DataError, match="cannot be read"):
        published(tmp_path)
