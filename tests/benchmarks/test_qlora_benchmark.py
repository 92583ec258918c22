from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmphi.benchmarks import qlora
from mmphi.benchmarks._qlora_models import SHAPES, prepare


def test_losses_are_those_of_peft_on_transformers_llava(tmp_path: Path) -> None:
    """In one process: what is compared is equal; how fast it is decides nothing."""
    prepare(tmp_path, SHAPES["tiny"], 3)
    found = {side: qlora.run_side(side, tmp_path, "tiny", 3) for side in qlora.SIDES}
    assert found["peft"]["losses"] == pytest.approx(found["mmphi"]["losses"], abs=2e-4)
    assert len(set(found["mmphi"]["losses"])) == 3
    for side in found.values():
        assert len(side["seconds"]) == 3
        assert side["memory_gb"] > 0


def test_it_prints_sides_and_ratios(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    def written(folder: Path, *_: object) -> None:
        (folder / "rows.json").write_text(json.dumps([[{"supervised": [True, False, True]}]] * 2))

    def side(name: str, *_: object) -> dict:
        return {"losses": [1.0, 0.5], "seconds": [9.0, 4.0 if name == "peft" else 2.0], "memory_gb": 1.5}

    monkeypatch.setattr(qlora, "prepare", written)
    monkeypatch.setattr(qlora, "in_process", side)
    assert qlora.main(["--shape", "tiny", "--steps", "2", "--rounds", "1", "--json", str(tmp_path / "a.json")]) == 0
    said = capsys.readouterr().out
    assert "2.00x" in said
    assert set(json.loads((tmp_path / "a.json").read_text())) == {"peft", "mmphi"}
    with pytest.raises(SystemExit):
        qlora.main(["--steps", "1"])
