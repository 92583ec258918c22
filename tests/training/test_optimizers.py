from __future__ import annotations

import copy

import pytest
import torch
from builders import Recorder, encode, example, tiny_language

from mmphi.config import TrainingSettings
from mmphi.errors import Stopped
from mmphi.models.packed_vlm import PackedVLM
from mmphi.training.muon import Muon, newton_schulz
from mmphi.training.optimizers import MuonAdamW, grouped_adamw
from mmphi.training.packed_dataset import packed_dataset
from mmphi.training.trainer import train


def model() -> PackedVLM:
    language = tiny_language()
    return PackedVLM(language.model.requires_grad_(True))


def optimizer(packed: PackedVLM) -> MuonAdamW:
    return MuonAdamW(packed, learning_rate=1e-2, muon_learning_rate=2e-2, weight_decay=0.1)


def test_inner_matrices_alone_are_muons():
    packed = model()
    names = optimizer(packed).matrices
    assert names
    assert all(".layers." in name and name.endswith("weight") for name in names)
    shapes = dict(packed.named_parameters())
    assert all(shapes[name].ndim == 2 for name in names)
    left = set(shapes) - set(names)
    assert any("embed_tokens" in name for name in left)
    assert any("lm_head" in name for name in left)


def test_each_updates_its_own_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's iteration, without its rounding.
    packed, loss_of = model(), lambda m: sum((p * p).sum() for p in m.parameters())
    reference = copy.deepcopy(packed)
    ours = optimizer(packed)
    named = dict(reference.named_parameters())
    muon = torch.optim.Muon([named[n] for n in ours.matrices], lr=2e-2, weight_decay=0.1, momentum=0.95)
    rest = [p for n, p in named.items() if n not in ours.matrices]
    adamw = torch.optim.AdamW(rest, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for _ in range(3):
        ours.zero_grad()
        loss_of(packed).backward()
        ours.step()
        muon.zero_grad()
        adamw.zero_grad()
        loss_of(reference).backward()
        muon.step()
        adamw.step()
    for name, parameter in packed.named_parameters():
        assert torch.equal(parameter, named[name]), name


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_kernels_are_matrices_from_what_they_see_to_their_channels(form: torch.memory_format) -> None:
    torch.manual_seed(0)
    kernels = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Conv2d(8, 6, 1)).to(memory_format=form)
    alone = [torch.nn.Parameter(k.weight.detach().permute(0, 2, 3, 1).flatten(1).clone()) for k in kernels]
    ours = MuonAdamW(kernels, learning_rate=1e-2, muon_learning_rate=2e-2, weight_decay=0.1)
    assert ours.matrices == ["0.weight", "1.weight"]
    theirs = Muon(alone, lr=2e-2, weight_decay=0.1, momentum=0.95)
    inputs = torch.randn(2, 4, 9, 9)
    for step in range(3):
        kernels(inputs).square().mean().backward()
        for kernel, matrix in zip(kernels, alone, strict=True):
            matrix.grad = kernel.weight.grad.permute(0, 2, 3, 1).flatten(1)
        ours.step()
        theirs.step()
        ours.zero_grad()
        assert kernels[0].weight.grad is None
        if step == 1:  # Whatever was learned goes on from what was saved.
            saved = copy.deepcopy(ours.state_dict())
            ours = MuonAdamW(kernels, learning_rate=1e-2, muon_learning_rate=2e-2, weight_decay=0.1)
            ours.load_state_dict(saved)
    for kernel, matrix in zip(kernels, alone, strict=True):
        assert torch.allclose(kernel.weight.permute(0, 2, 3, 1).flatten(1), matrix, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_a_cpus_muon_is_torchs_but_for_its_rounding(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    first = torch.randn(shape)
    moved = []
    for kind in (Muon, torch.optim.Muon):
        parameter = torch.nn.Parameter(first.clone())
        optimizer = kind([parameter], lr=0.1, weight_decay=0.1, momentum=0.9)
        for step in range(3):
            parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        moved.append((parameter.detach() - first, optimizer.state_dict()["state"][0]["momentum_buffer"]))
    assert (moved[0][0] - moved[1][0]).norm() < 0.02 * moved[1][0].norm()
    assert torch.equal(moved[0][1], moved[1][1])


def test_what_is_orthogonalized_has_singular_values_about_one() -> None:
    matrix = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(newton_schulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7))
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.3


def run(folder, validate=None) -> PackedVLM:
    packed, language = model(), tiny_language()
    samples = [encode(example(i, f"answer {i}", image=False), language.prompt, 0, 60) for i in range(8)]
    settings = TrainingSettings(steps=6, batch_size=4, save_every=2, log_every=1, eval_every=1)
    train(
        packed,
        packed_dataset(samples, {}, settings),
        settings,
        folder=folder,
        tracker=Recorder(),
        title="test",
        optimizer=optimizer(packed),
        validate=validate,
    )
    return packed


@pytest.mark.slow
def test_resumed_equals_straight_to_the_bit(tmp_path):
    straight = run(tmp_path / "straight")

    def stop_after_three(step: int) -> dict[str, float]:
        if step == 3:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)
        return {"val/loss": 1.0}

    with pytest.raises(Stopped):
        run(tmp_path / "cut", stop_after_three)
    resumed = run(tmp_path / "cut")
    for (name, one), (_, other) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_groups_have_rates_of_their_own_and_decay_is_for_matrices():
    one, other = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)
    optimizer = grouped_adamw(
        [(list(one.parameters()), 0.1), ([], 0.5), (list(other.parameters()), 0.01)], weight_decay=0.3, beta2=0.9
    )
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    wanted = {one.weight: (0.1, 0.3), one.bias: (0.1, 0.0), other.weight: (0.01, 0.3), other.bias: (0.01, 0.0)}
    assert found == {id(parameter): values for parameter, values in wanted.items()}
    assert all(group["betas"] == (0.9, 0.9) for group in optimizer.param_groups)
