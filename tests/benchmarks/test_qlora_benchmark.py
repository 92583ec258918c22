from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmphi.benchmarks import qlora
from mmphi.benchmarks._qlora_models import SHAPES, Shape, prepare, step_flops


def test_losses_are_those_of_peft_on_transformers_llava(tmp_path: Path) -> None:
    """In one process: what is compared is equal; how fast it is decides nothing."""
    prepare(tmp_path, SHAPES["tiny"], 3)
    found = {side: qlora.run_side(side, tmp_path, "tiny", 3, profiled=True) for side in qlora.SIDES}
    assert found["peft"]["losses"] == pytest.approx(found["mmphi"]["losses"], abs=2e-4)
    assert len(set(found["mmphi"]["losses"])) == 3
    for side in found.values():
        assert len(side["seconds"]) == 1  # The first warms up, the last is watched.
        assert side["memory_gb"] > 0
        assert "aten::" in side["profile"]


def test_it_prints_sides_and_ratios(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    def side(name: str, folder: Path, *_: object) -> dict:
        if name == "prepare":
            (folder / "rows.json").write_text(json.dumps([[{"ids": [1, 2, 3], "supervised": [True, False, True]}]] * 2))
        seconds = [4.0 if name == "peft" else 2.0]
        return {"losses": [1.0, 0.5], "seconds": seconds, "memory_gb": 1.5, "profile": f"what {name} does"}

    monkeypatch.setattr(qlora, "in_process", side)
    assert qlora.main(["--shape", "tiny", "--steps", "2", "--rounds", "1", "--json", str(tmp_path / "a.json")]) == 0
    said = capsys.readouterr().out
    assert "2.00x" in said
    assert "what peft does" in said
    assert "MFU" in said
    assert set(json.loads((tmp_path / "a.json").read_text())) == {"peft", "mmphi"}
    with pytest.raises(SystemExit):
        qlora.main(["--steps", "1"])


def test_operations_are_those_of_the_layers_the_head_and_what_is_seen() -> None:
    shape = Shape(width=8, layers=2)
    row = {"ids": [1] * 5, "supervised": [False, False, True, False, True]}
    layers, head, seen = 4 * (4 * 64 + 2 * 8 * 32) * 2 * 5, 4 * 51200 * 8 * 2, 12 * 2 * 8 * (1 + 2 + 3 + 4 + 5)
    assert step_flops(shape, [row]) == layers + head + seen
    assert step_flops(shape, [row, row]) == 2 * step_flops(shape, [row])
