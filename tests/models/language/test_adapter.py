"""An adapter on a quantised model: packing, recomputing and processes change nothing, and the model stays as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import RandomFeatures, encode, example, tiny_language
from workers import spawn

from mmphi.models.language.adapter import AdapterConfig, adapter_parameters, add_adapter
from mmphi.models.language.language_model import LanguageModel, _quantize, disable_bnb_repacking
from mmphi.models.packed_vlm import PackedVLM
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.text.packing import pack

CPU = torch.device("cpu")


def four_bits() -> LanguageModel:
    """A small model in NF4, with nobody else's layers."""
    language = tiny_language()
    return replace(
        language, model=disable_bnb_repacking(_quantize(language.model, "4bit", CPU)).requires_grad_(False).eval()
    )


def model(dropout: float = 0.0, learned: bool = True) -> PackedVLM:
    """With an adapter that has learned something, at random."""
    language = add_adapter(four_bits(), AdapterConfig(rank=4, alpha=8, dropout=dropout))
    torch.manual_seed(1)
    if learned:
        for parameter in adapter_parameters(language).values():
            torch.nn.init.normal_(parameter, std=0.2)
    return PackedVLM(language.model, image=Projector(ProjectorConfig(RandomFeatures.width, 32)))


def samples(count: int = 5) -> list:
    language = tiny_language()
    return [encode(example(i, "a dog " * (i + 1)), language.prompt, 4, 100) for i in range(count)]


def test_a_new_adapter_changes_nothing_and_is_all_that_learns():
    bare = PackedVLM(four_bits().model, image=Projector(ProjectorConfig(RandomFeatures.width, 32)))
    new = model(learned=False)
    new.projectors.load_state_dict(bare.projectors.state_dict())
    rows = pack(samples(), {"image": RandomFeatures()})
    assert torch.allclose(new(**rows), bare(**rows), rtol=1e-6)
    learning = {name for name, p in new.named_parameters() if p.requires_grad}
    assert learning
    assert all("lora_" in name or name.startswith("projectors.") for name in learning)
    assert not any("lm_head" in name for name in learning)


def test_packed_is_alone():
    packed, features = model(), {"image": RandomFeatures()}
    alone = [packed(**pack([sample], features)).item() for sample in samples()]
    assert packed(**pack(samples(), features)).item() == pytest.approx(sum(alone), rel=1e-5)


def gradients(packed: PackedVLM) -> dict[str, torch.Tensor]:
    packed.zero_grad()
    torch.manual_seed(3)
    packed(**pack(samples(), {"image": RandomFeatures()})).backward()
    return {name: p.grad.clone() for name, p in packed.named_parameters() if p.grad is not None}


def test_recomputed_is_remembered():
    """With dropout, whose draws must be the same twice; and dropout is the adapter's alone."""
    packed = model(dropout=0.3).train()
    plain = gradients(packed)
    with packed.recomputing():
        again = gradients(packed)
    assert plain.keys() == again.keys()
    assert all(torch.allclose(plain[name], again[name], rtol=1e-4, atol=1e-6) for name in plain)
    packed.eval()
    assert any(not torch.equal(plain[name], tensor) for name, tensor in gradients(packed).items())
    assert not any(m.training for m in packed.modules())


WORKER = """
import test_adapter
from mmphi.config import TrainingSettings
from mmphi.training.optimizers import grouped_adamw
from mmphi.training.packed_dataset import packed_dataset
from mmphi.training.trainer import train
packed = test_adapter.model()
settings = TrainingSettings(steps=4, batch_size=4, log_every=1, eval_every=10, save_every=10)
learned = {name: p for name, p in packed.named_parameters() if p.requires_grad}
optimizer = grouped_adamw([(list(learned.values()), 1e-3)], weight_decay=0.0, beta2=0.999)
steps = packed_dataset(test_adapter.samples(), {"image": test_adapter.RandomFeatures()}, settings)
train(packed, steps, settings, folder=RUN, tracker=recorder, title="test", optimizer=optimizer)
saved = {name: p.detach().clone() for name, p in learned.items()}
"""


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    one, two = (spawn(tmp_path, n, __file__, WORKER) for n in (1, 2))
    begun = dict(model().named_parameters())
    assert any(not torch.equal(one[name], begun[name]) for name in one)
    assert all(torch.allclose(one[name], two[name], atol=2e-5) for name in one)
