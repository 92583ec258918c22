"""The weights of the best validation are the result, whatever came after, and after a kill, too."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import pytest
import torch
from builders import Recorder
from small_training import ANSWERS, new_projector, trained, weights

from mmphi.errors import Stopped
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.training.best_checkpoint import BestCheckpoint, remove_kept
from mmphi.training.trainer import TrainingResult


class Said:
    """Validation losses as they are told, and the weights that each was of."""

    def __init__(self, losses, stop_at=0):
        self.losses, self.stop_at = losses, stop_at
        self.weights = {}
        self.projector = None

    def __call__(self, step):
        self.weights[step] = weights(self.projector)
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"val/loss": self.losses[step], "val/other": float(step)}


def run(folder, said, tracker=None, keep_best=True) -> tuple[Projector, TrainingResult]:
    said.projector = new_projector()
    changes = {"batch_size": 2, "eval_every": 2, "learning_rate": 1e-2}
    options = {"tracker": tracker or Recorder(), "validate": said, "keep_best": keep_best}
    return said.projector, trained(said.projector, folder, changes, ANSWERS[:4], **options)


@pytest.mark.parametrize(
    ("losses", "best"), [({2: 3.0, 4: 1.0, 6: 2.0}, 4), ({2: 1.0, 4: 1.0, 6: math.nan}, 2), ({2: 3, 4: 2, 6: 1}, 6)]
)
def test_the_best_weights_are_the_result(tmp_path, recorder, losses, best):
    said = Said(losses)
    projector, told = run(tmp_path, said, recorder)
    assert torch.equal(weights(projector), said.weights[best])
    assert (told.steps, told.result_step) == (6, best)
    assert told.figures == {"val/loss": losses[best], "val/other": float(best)}
    assert any(f"using the weights of step {best}," in line for line in recorder.said)
    remove_kept(tmp_path)
    assert not list(tmp_path.glob("best*"))


def test_else_the_last_ones_are(tmp_path):
    said = Said({2: 1.0, 4: 2.0, 6: 3.0})
    projector, told = run(tmp_path, said, keep_best=False)
    assert torch.equal(weights(projector), said.weights[6])
    assert (told.result_step, told.figures) == (6, {})
    assert not list(tmp_path.glob("best*"))


def test_where_no_loss_is_a_number_the_last_ones_stay(tmp_path):
    said = Said(dict.fromkeys((2, 4, 6), math.nan))
    projector, told = run(tmp_path, said)
    assert torch.equal(weights(projector), said.weights[6])
    assert told.result_step == 6


def test_stopped_and_gone_on_with_it_is_the_best_of_both(tmp_path):
    losses = {2: 1.0, 4: 2.0, 6: 3.0}
    first = Said(losses, stop_at=2)
    with pytest.raises(Stopped):
        run(tmp_path, first)
    second = Said(losses)
    projector, told = run(tmp_path, second)
    assert 2 not in second.weights
    assert torch.equal(weights(projector), first.weights[2])
    assert told.result_step == 2


@pytest.mark.slow
def test_ended_and_asked_again_it_gives_the_same(tmp_path):
    """As after a kill between the training's end and the saving of its result."""
    losses = {2: 2.0, 4: 1.0, 6: 3.0}
    expected, _ = run(tmp_path, Said(losses))
    again, told = run(tmp_path, Said(losses))
    assert torch.equal(weights(again), weights(expected))
    assert told.result_step == 4


def test_a_kill_between_the_renames_keeps_the_former_weights(tmp_path, monkeypatch):
    best = BestCheckpoint(tmp_path, Projector(ProjectorConfig(4, 4)))
    best.offer(1, {"val/loss": 2.0})
    rename = Path.rename

    def killed(self, target):
        if self.suffix == ".part":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            best.offer(2, {"val/loss": 1.0})
    assert BestCheckpoint(tmp_path, Projector(ProjectorConfig(4, 4))).step == 1


def test_half_a_copy_does_not_count(tmp_path):
    projector = Projector(ProjectorConfig(4, 4))
    best = BestCheckpoint(tmp_path, projector)
    best.offer(1, {"val/loss": 2.0})
    (tmp_path / "best.part").mkdir()
    (tmp_path / "best.part" / "trained.safetensors").write_bytes(b"torn")
    again = BestCheckpoint(tmp_path, projector)
    assert (again.step, again.figures) == (1, {"val/loss": 2.0})
    again.offer(2, {"val/loss": 1.0})
    assert again.step == 2
