"""Benchmarks run and compare equals with equals; how fast they are decides no test."""

from __future__ import annotations

import json

import pytest

from mmphi.benchmarks import data, embed, features

pytestmark = pytest.mark.slow


def test_embed_features_are_open_clips(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert embed.main(["--images", "6", "--rounds", "1", "--workers", "0", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["largest_difference"][0] < 0.01
    assert "images/s" in capsys.readouterr().out


def test_data_are_read_and_tokenised_whole(tmp_path, capsys):
    assert data.main(["--rows", "40", "--images", "20", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["tokens"] > 576
    assert "40 rows, 20 images" in capsys.readouterr().out


def test_features_are_what_was_written(tmp_path, capsys):
    small = ["--rows", "100", "--tokens", "3", "--width", "8", "--batches", "2", "--rounds", "1"]
    assert features.main([*small, "--json", str(tmp_path / "out.json")]) == 0
    assert set(json.loads((tmp_path / "out.json").read_text())) == {"mmphi", "numpy", "safetensors", "arrow"}
    assert "rows/s" in capsys.readouterr().out
