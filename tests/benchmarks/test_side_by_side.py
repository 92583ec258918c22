"""Training steps beside the usual way: the same losses; how fast they are decides no test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmphi.benchmarks import _side_by_side, projector, qlora
from mmphi.benchmarks._conversations import SHAPES, Shape, prepare, step_flops
from mmphi.benchmarks._side_by_side import batches_of

pytestmark = pytest.mark.slow

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("benchmark")
    prepare(made, SHAPES["tiny"], STEPS)
    return made


def test_losses_are_those_of_peft_on_transformers_llava(folder: Path) -> None:
    """In one process: what is compared is equal; how fast it is decides nothing."""
    sides = qlora.COMPARISON.sides
    found = {side: qlora.COMPARISON.run_side(side, folder, "tiny", profiled=True) for side in sides}
    for name, side in sides.items():
        if side.same:
            assert found[name]["losses"] == pytest.approx(found[side.same]["losses"], abs=2e-4)
    assert {name for name, side in sides.items() if side.same} == {"peft", "peft-sorted"}
    assert found["peft"]["losses"] != found["peft-sorted"]["losses"]
    assert len(set(found["mmphi"]["losses"])) == STEPS
    for figures in found.values():
        assert len(figures["seconds"]) == len(figures["tokens"]) == 1  # The first warms up, the last is watched.
        assert figures["memory_gb"] > 0
        assert "aten::" in figures["profile"]


def test_projector_losses_are_llavas_in_both_orders(folder: Path) -> None:
    sides = projector.COMPARISON.sides
    found = {side: projector.COMPARISON.run_side(side, folder, "tiny") for side in sides}
    for name, side in sides.items():
        if side.same:
            assert found[name]["losses"] == pytest.approx(found[side.same]["losses"], abs=2e-4)
            assert found[name]["tokens"] == found[side.same]["tokens"]
    assert found["padded"]["losses"] != found["sorted"]["losses"]
    assert len(set(found["mmphi"]["losses"])) == STEPS
    assert projector.COMPARISON.unequal({name: [run] for name, run in found.items()}, 1e-3) == []


def test_workers_load_the_same(folder: Path) -> None:
    alone = projector.COMPARISON.run_side("mmphi", folder, "tiny")
    helped = projector.COMPARISON.run_side("mmphi", folder, "tiny", workers=1)
    assert helped["losses"] == alone["losses"]


def test_rows_sorted_by_length_are_the_same_rows(folder: Path) -> None:
    def ids(batches: object) -> list:
        return sorted(row["ids"] for batch in batches for row in batch)  # type: ignore[attr-defined]

    plain, ordered = batches_of(folder, by_length=False), batches_of(folder, by_length=True)
    assert ids(plain) == ids(ordered)

    def padding(batches: object) -> int:
        lengths = [[len(row["ids"]) for row in batch] for batch in batches]  # type: ignore[attr-defined]
        return sum(max(batch) * len(batch) - sum(batch) for batch in lengths)

    assert padding(ordered) < padding(plain)


def side(_: str, name: str, arguments: list[str]) -> dict:
    """What a side's process would say."""
    which = arguments[arguments.index("--side") + 1]
    seconds, ours = ([2.0], [1.0, 0.5]) if "mmphi" in which else ([4.0], [1.0, 0.5005])
    return {
        "losses": ours,
        "seconds": seconds,
        "tokens": [10],
        "flops": [1e9],
        "memory_gb": 1.5,
        "profile": f"what {which} does",
    }


def test_it_prints_sides_and_ratios(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(_side_by_side, "in_process", side)
    assert qlora.main(["--shape", "tiny", "--steps", "2", "--rounds", "1", "--json", str(tmp_path / "a.json")]) == 0
    said = capsys.readouterr().out
    assert "2.00x" in said
    assert "what peft does" in said
    assert "MFU" in said
    assert "outside the clock" in said
    assert set(json.loads((tmp_path / "a.json").read_text())) == set(qlora.COMPARISON.sides)
    with pytest.raises(SystemExit):
        qlora.main(["--steps", "1"])


def test_it_fails_where_losses_differ(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(_side_by_side, "in_process", side)
    asked = ["--shape", "tiny", "--steps", "2", "--rounds", "1"]
    assert projector.main(asked) == 0
    monkeypatch.setitem(_side_by_side.TOLERANCE, "fp32", 1e-4)
    assert projector.main(asked) == 1
    assert "losses of padded and mmphi differ by 0.0005 nats/token at step 2" in capsys.readouterr().err
    assert projector.main([*asked, "--without", "padded", "sorted"]) == 0


def test_the_adapter_benchmark_fails_where_losses_differ(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(_side_by_side, "in_process", side)
    asked = ["--shape", "tiny", "--steps", "2", "--rounds", "1"]
    assert qlora.main(asked) == 0
    monkeypatch.setitem(_side_by_side.TOLERANCE, "fp32", 1e-4)
    assert qlora.main(asked) == 1
    assert "losses of peft and mmphi differ by 0.0005 nats/token at step 2" in capsys.readouterr().err


def test_a_loss_that_is_no_number_is_no_equal() -> None:
    rounds = {"padded": [{"losses": [1.0, float("nan")]}], "mmphi": [{"losses": [1.0, 1.0]}]}
    assert len(projector.COMPARISON.unequal(rounds, 1e-3)) == 1


def test_operations_are_those_of_the_layers_the_head_and_what_is_seen() -> None:
    shape = Shape(width=8, layers=2)
    row = {"ids": [1] * 5, "supervised": [False, False, True, False, True]}
    layers, head, seen = 4 * (4 * 64 + 2 * 8 * 32) * 2 * 5, 4 * 51200 * 8 * 2, 12 * 2 * 8 * (1 + 2 + 3 + 4 + 5)
    assert step_flops(shape, [row]) == layers + head + seen
    assert step_flops(shape, [row, row]) == 2 * step_flops(shape, [row])
