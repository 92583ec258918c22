from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from builders import RandomFeatures, Recorder, encode, example, tiny_language

from mmphi.allocator import keep_freed_memory
from mmphi.config import TrainingSettings
from mmphi.models.packed_vlm import PackedVLM
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.text.packing import Layout
from mmphi.training.packed_dataset import packed_dataset
from mmphi.training.throughput import Throughput, peak_memory_bytes, reset_peak_memory
from mmphi.training.trainer import train


def test_waiting_for_data_counts_and_pauses_do_not(monkeypatch):
    now = itertools.count()  # Every look at the clock is a second later.
    monkeypatch.setattr("mmphi.training.throughput.time.perf_counter", lambda: float(next(now)))
    throughput = Throughput()
    throughput.start()  # 0
    throughput.tokens += 60
    with throughput.paused():  # stopped at 1, started again at 2
        pass
    assert throughput.read() == 60 / 2  # 0 to 1 and 2 to 3
    throughput.tokens += 10
    assert throughput.read() == 10.0  # 4 to 5: it went on after the reading
    assert throughput.read() == 0.0


def test_padding_is_no_token(tmp_path):
    """Every sequence once: the rate times the seconds is the number of their tokens."""
    language, counted = tiny_language(), []
    samples = [encode(example(i, "a" * (3 + 20 * i)), language.prompt, 4, 300) for i in range(4)]
    projector = Projector(ProjectorConfig(RandomFeatures.width, 32))
    model = PackedVLM(language.model, layout=Layout("alone"), image=projector)
    settings = TrainingSettings(steps=1, batch_size=4)
    steps = packed_dataset(samples, {"image": RandomFeatures()}, settings, layout=Layout("alone"))
    assert steps[0]["input_ids"].numel() > sum(map(len, samples))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Throughput, "read", lambda self: counted.append(self.tokens) or 1.0)
        train(model, steps, settings, folder=tmp_path, tracker=Recorder(), title="test")
    assert counted[0] == sum(map(len, samples))


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="only Linux resets a process's peak")
@pytest.mark.parametrize("kept", [False, True])
def test_peak_is_that_of_what_follows_the_reset(kept):
    if kept:  # From here on, for this process.
        keep_freed_memory()
    large = np.ones(40_000_000)  # 320 MB
    high = peak_memory_bytes()
    del large
    reset_peak_memory()
    assert peak_memory_bytes() < high - 200_000_000
