"""Stages built beside each other, by the process that the command line starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import small
import torch

from mmphi.pipeline.build import Pipeline
from mmphi.stages import STAGES
from mmphi.tracking.run_writer import TrackingStore


@pytest.fixture(scope="module")
def alone(small_chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """What one process with one thread builds."""
    with small.built("projector", small_chain, tmp_path_factory.mktemp("alone")) as pipeline:
        yield pipeline


@pytest.mark.slow
def test_built_beside_is_built_alone(alone: Pipeline, empty_store: str) -> None:
    """Two threads, one of them the helper's: the same weights and features to the bit, and by two processes."""
    settings = small.settings()
    torch.set_num_threads(2)
    pipeline = Pipeline(STAGES, TrackingStore(empty_store), helper="mmphi.stages.background_worker")
    pipeline.build("projector", settings, after=False)
    pids = {}
    for name, files in (("pretrain", "model.safetensors"), ("light_clip", "open_clip*"), ("embed", "features-*")):
        mine, theirs = pipeline.result(name, settings), alone.result(name, settings)
        assert mine
        assert theirs
        pids[name] = int(pipeline.store.run(mine.run_id).data.tags["mmphi.pid"])
        found = [path.relative_to(mine.path) for path in sorted((mine.path).rglob(files))]
        assert found, name
        assert [(mine.path / f).read_bytes() for f in found] == [(theirs.path / f).read_bytes() for f in found], name
    assert pids["pretrain"] == os.getpid()
    assert pids["light_clip"] == pids["embed"] != os.getpid()
