from __future__ import annotations

import pytest

from mmphi.config import TrainingSettings
from mmphi.config.pretrain import PretrainSettings
from mmphi.errors import SettingsError
from mmphi.training.lr_scaling import adamw_learning_rate, batch_factor, with_learning_rates
from mmphi.training.peak_flops import measure_peak_flops, peak_flops
from mmphi.training.stop_criteria import StopCriteria, parse_stop

NOW = {"initial": 10.8, "loss": 9.9, "tokens": 5e5, "steps": 10, "seconds": 30.0}


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("initial-1", StopCriteria(below_initial=1)),
        ("Initial - 0.5", StopCriteria(below_initial=0.5)),
        ("2.5", StopCriteria(loss=2.5)),
        ("loss 3", StopCriteria(loss=3)),
        ("tokens 2M, steps 1k", StopCriteria(tokens=2e6, steps=1000)),
        ("time 20m", StopCriteria(seconds=1200)),
        ("1.5h, tokens 1B", StopCriteria(seconds=5400, tokens=1e9)),
    ],
)
def test_conditions_are_read(text, stop):
    assert parse_stop(text) == stop


@pytest.mark.parametrize("text", ["", "soon", "tokens", "tokens -3", "steps 0", "1.2.3", "loss x", "20 parsecs"])
def test_what_cannot_be_read(text):
    with pytest.raises(SettingsError, match=r"pretrain\.stop") as caught:
        parse_stop(text)
    assert "tokens 2M" in caught.value.hint


@pytest.mark.parametrize(
    ("stop", "reason"),
    [
        (StopCriteria(below_initial=1), ""),
        (StopCriteria(below_initial=0.9), "a loss of 9.900 (target 9.900)"),
        (StopCriteria(loss=10), "a loss of 9.900 (target 10.000)"),
        (StopCriteria(tokens=5e5), "500,000 tokens"),
        (StopCriteria(steps=11), ""),
        (StopCriteria(steps=10), "10 steps"),
        (StopCriteria(seconds=30), "30 s of training"),
    ],
)
def test_the_first_to_hold_ends(stop, reason):
    assert stop.reason(**NOW) == reason


def test_schedule_is_laid_over_what_is_known():
    assert StopCriteria(tokens=1000).most_steps(300, 7) == 4
    assert StopCriteria(steps=2, tokens=1000).most_steps(300, 7) == 2
    assert StopCriteria(loss=3, seconds=60).most_steps(300, 7) == 7


def test_rates_follow_size_and_batch():
    # The best of a grid by others (lucaslingle.substack.com, "Scaling laws for optimal LR and batch", 2025).
    assert adamw_learning_rate(46_006_272, 127_991_808, 32768) == pytest.approx(0.001953, rel=0.15)
    assert adamw_learning_rate(109_051_904, 255_983_616, 65536) == pytest.approx(0.001381, rel=0.15)
    assert adamw_learning_rate(10**6, 10**9, 2**19) > adamw_learning_rate(10**9, 10**9, 2**19) > 0
    assert adamw_learning_rate(10**6, 10**9, 2000) / adamw_learning_rate(10**6, 10**9, 500) == pytest.approx(2)
    assert adamw_learning_rate(10**6, 10**9, 2**22) == adamw_learning_rate(10**6, 10**9, 2**23)
    assert batch_factor(10**9) == pytest.approx(1, abs=1e-3)
    assert batch_factor(400) / batch_factor(100) == pytest.approx(2, rel=0.1)  # The square root, where it is small.


def test_rates_that_are_given_stay():
    assert (
        with_learning_rates(TrainingSettings(learning_rate=0.5, muon_learning_rate=0.3), 10**6, 64, 4096).learning_rate
        == 0.5
    )
    filled = with_learning_rates(PretrainSettings(), 10**6, 64, 4096)
    assert 0 < filled.learning_rate < 0.1
    assert 0 < filled.muon_learning_rate < 0.1
    beside = with_learning_rates(PretrainSettings(optimizer="muon"), 10**6, 768, 10**9)
    assert beside.learning_rate == pytest.approx(0.004, rel=1e-3)
    assert beside.muon_learning_rate == pytest.approx(0.02, rel=1e-3)


def test_peak_is_named():
    assert peak_flops(3.5).flops == 3.5e12
    assert "(setting)" in peak_flops(3.5).name
    import torch

    found = measure_peak_flops(torch.float32)
    assert found.flops > 1e9
    assert "measured" in found.name
