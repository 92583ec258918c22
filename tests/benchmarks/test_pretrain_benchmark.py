from __future__ import annotations

import json

import pytest
import torch

from mmphi.benchmarks import _pretrain_sides as sides
from mmphi.benchmarks import pretrain
from mmphi.benchmarks._minimal_phi import MinimalPhi

pytestmark = pytest.mark.slow


def test_losses_are_those_of_the_trainer_and_of_a_plain_loop():
    """In one process: what is compared is equal; how fast it is decides nothing."""
    shape = pretrain.SHAPES["tiny"]
    mixed = {side: pretrain.run_side(side, "mixed", shape, 3) for side in pretrain.SIDES["mixed"]}
    rows = {side: pretrain.run_side(side, "rows", shape, 3) for side in pretrain.SIDES["rows"]}
    for found in (mixed, rows):
        for side in found.values():
            assert side["losses"] == pytest.approx(found["mmphi"]["losses"], abs=2e-4)
            assert len(side["seconds"]) == 3
            assert side["memory_gb"] > 0
    padding = {side: found["positions_per_token"] for side, found in mixed.items()}
    assert padding["padded"] > padding["sorted"] > padding["packed"] == padding["mmphi"] == 1
    runs = {f"mixed/{side}": [found] for side, found in mixed.items()}
    assert pretrain.unequal(runs, 1e-3) == []
    assert len(set(mixed["mmphi"]["losses"])) == 3


def test_minimal_phi_is_phi():
    model = sides.build(pretrain.SHAPES["tiny"])
    ids = torch.randint(0, 300, (2, 33))
    expected = model(input_ids=ids, labels=ids).loss
    assert MinimalPhi.from_hugging_face(model)(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(
        expected.item(), abs=1e-5
    )


def test_batches_have_the_tokens_that_they_are_said_to():
    shape = pretrain.SHAPES["tiny"]
    for kind in pretrain.SIDES:
        documents = sides.documents(shape, 0, kind)
        assert sum(len(ids) - 1 for ids in documents) == shape.batch_tokens
        assert max(map(len, documents)) <= shape.context + 1


def test_it_prints_sides_and_ratios(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        pretrain,
        "in_process",
        lambda *_: {"losses": [1.0, 0.5], "seconds": [9.0, 2.0], "memory_gb": 1.5, "positions_per_token": 1.0},
    )
    assert pretrain.main(["--shape", "tiny", "--steps", "2", "--rounds", "1", "--json", str(tmp_path / "a.json")]) == 0
    said = capsys.readouterr().out
    assert "padded" in said
    assert "1.00x" in said
    assert set(json.loads((tmp_path / "a.json").read_text())) == {
        *("mixed/padded", "mixed/sorted", "mixed/packed", "mixed/mmphi"),
        *("rows/loop", "rows/loop-compiled", "rows/mmphi", "rows/mmphi-compiled"),
    }  # fmt: skip


def test_it_fails_where_losses_differ(capsys, monkeypatch):
    def measured(side, *_):
        last = 0.5 if side != "sorted" else 0.51
        return {"losses": [1.0, last], "seconds": [9.0, 2.0], "memory_gb": 1.5, "positions_per_token": 1.0}

    monkeypatch.setattr(pretrain, "in_process", measured)
    assert pretrain.main(["--shape", "tiny", "--steps", "2", "--rounds", "1"]) == 1
    assert "mixed: losses of sorted and mmphi differ by 0.01 nats/token at step 2" in capsys.readouterr().err


def test_sorted_passes_hold_all_documents_of_a_step():
    shape = pretrain.SHAPES["10M"]
    taken = sides.passes(shape, 3, "mixed", "sorted")
    assert len(taken) == shape.passes
    assert sorted(ids for batch in taken for ids in batch) == sorted(sides.documents(shape, 3, "mixed"))
    lengths = [len(ids) for batch in taken for ids in batch]
    assert lengths == sorted(lengths)
