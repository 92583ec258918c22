"""A loss that is no number ends the training, with its batch saved: at once, or one pass later."""

import pytest
import torch
from safetensors.torch import load_file

from mmphi.errors import TrainingError
from mmphi.training.nan_guard import FiniteLoss


def batch(number):
    return {"input_ids": torch.full((1, 2), number), "features": {"image": torch.zeros(3)}, "longest": 2}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_on_a_processor_it_is_seen_at_once(tmp_path, bad):
    watch = FiniteLoss(tmp_path)
    watch.note(1, torch.tensor(2.0), batch(1))
    with pytest.raises(TrainingError, match=r"the loss at step 2 is -?(nan|inf); the batch is saved as"):
        watch.note(2, torch.tensor(bad), batch(2))
    saved = load_file(tmp_path / "bad_batch.safetensors")
    assert saved["input_ids"].unique().tolist() == [2]
    assert set(saved) == {"input_ids", "features.image"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator, on which losses come later")
def test_on_an_accelerator_it_is_seen_one_pass_later_and_its_own_batch_is_saved(tmp_path):
    watch = FiniteLoss(tmp_path)
    watch.note(2, torch.tensor(float("nan"), device="cuda"), batch(2))
    with pytest.raises(TrainingError, match="at step 2"):
        watch.note(3, torch.tensor(1.0, device="cuda"), batch(3))
    assert load_file(tmp_path / "bad_batch.safetensors")["input_ids"].unique().tolist() == [2]
    watch.note(4, torch.tensor(float("nan"), device="cuda"), batch(4))
    with pytest.raises(TrainingError, match="at step 4"):
        watch.look()
