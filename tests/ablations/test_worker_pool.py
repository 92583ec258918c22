from __future__ import annotations

import pytest

from ablations.worker_pool import environment, visible_gpus


def test_each_worker_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert visible_gpus() == ["2", "5"]
    assert [environment(place, 3) for place in range(3)] == [{"CUDA_VISIBLE_DEVICES": n} for n in ("2", "5", "2")]


def test_workers_without_gpus_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert visible_gpus() == []
    assert environment(0, 3) == {"OMP_NUM_THREADS": "2"}
    assert environment(0, 16) == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert environment(0, 3) == {"OMP_NUM_THREADS": "5"}
