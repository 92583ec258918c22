"""Benchmarks run and compare equals with equals; how fast they are decides no test."""

from __future__ import annotations

import json

import pytest

from mmphi.benchmarks import embed, features, projector


def test_projector_losses_are_llavas(tmp_path):
    out = tmp_path / "out.json"
    assert projector.main(["--shape", "tiny", "--steps", "4", "--rounds", "1", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    (theirs,), (ours,) = found["llava"], found["mmphi"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=2e-4)
    assert len(set(ours["losses"])) == 4
    assert ours["memory_gb"] > 0


def test_embed_features_are_the_plain_loops(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert embed.main(["--images", "6", "--rounds", "1", "--workers", "0", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["largest_difference"][0] < 0.01
    assert "images/s" in capsys.readouterr().out


def test_features_are_what_was_written(tmp_path, capsys):
    small = ["--rows", "100", "--tokens", "3", "--width", "8", "--batches", "2", "--rounds", "1"]
    assert features.main([*small, "--json", str(tmp_path / "out.json")]) == 0
    assert set(json.loads((tmp_path / "out.json").read_text())) == {"mmphi", "safetensors", "arrow"}
    assert "rows/s" in capsys.readouterr().out
