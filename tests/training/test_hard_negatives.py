"""What is said about one image is put to another one: the loss, against each sequence read alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from builders import RandomFeatures, encode, example, tiny_language

from mmphi.config import TrainingSettings
from mmphi.config.shared import ConversationSettings
from mmphi.errors import SettingsError
from mmphi.models.contrastive_margin import MARGIN, SOFT
from mmphi.models.language.linear_cross_entropy import linear_cross_entropy
from mmphi.models.packed_vlm import PackedVLM
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.stages.shared_models import check_training
from mmphi.text.packing import Layout, pack
from mmphi.text.tokenized_example import TokenizedExample
from mmphi.training.hard_negatives import pair_hard_negatives
from mmphi.training.packed_dataset import PackedStepDataset, packed_dataset, with_augmented_images

SOURCES = {"image": RandomFeatures()}
LANGUAGE = tiny_language()
SAID = [
    (1, "", "a dog"),
    (2, "", "snow lies"),
    (1, "is it?", "yes"),
    (3, "", "two dogs run"),
    (4, "", "xyz"),
    (5, "", "yet"),
]
SHAPE = {"steps": 4, "batch_size": 6, "seed": 3}


def told(image: int, question: str, answer: str) -> TokenizedExample:
    return encode(example(image, answer, question), LANGUAGE.prompt, 4, 200)


def samples() -> list[TokenizedExample]:
    return [told(*one) for one in SAID]


def model() -> PackedVLM:
    torch.manual_seed(1)
    return PackedVLM(LANGUAGE.model, image=Projector(ProjectorConfig(RandomFeatures.width, 32)))


def gradients(task: PackedVLM) -> list[torch.Tensor]:
    return [p.grad for p in task.projectors.parameters()]


def seen(sample: TokenizedExample) -> str:
    return sample.spans[0].reference.id


def test_halves_are_put_to_each_others_images() -> None:
    given = samples()
    units = pair_hard_negatives([*given, told(6, "", "last")])
    assert [len(unit.samples) for unit in units] == [4, 4, 4, 1]
    for k, unit in enumerate(units[:3]):
        first, other, second, back = unit.samples
        assert (first, second) == (given[k], given[3 + k])
        assert [seen(s) for s in unit.samples] == [seen(first), seen(first), seen(second), seen(second)]
        assert torch.equal(torch.as_tensor(other.input_ids), torch.as_tensor(second.input_ids))
        assert torch.equal(torch.as_tensor(back.input_ids), torch.as_tensor(first.input_ids))
        assert unit.foils == ((1, 2), (3, 0))


def test_what_cannot_be_compared_stands_alone() -> None:
    text = encode(example(0, "words", image=False), LANGUAGE.prompt, 4, 200)
    longer = encode(example(9, "words"), LANGUAGE.prompt, 6, 200)
    view = with_augmented_images(told(1, "", "bear"), 1)
    word = told(2, "", "no")  # As right of either image, it may be.
    for second in (told(1, "", "bear"), view, text, longer, word):
        first = text if second is text else told(1, "", "ape!")
        units = pair_hard_negatives([first, second])
        assert [unit.samples for unit in units] == [(first,), (second,)]
        assert not any(unit.foils for unit in units)


def expected_loss(task: PackedVLM, step: list[TokenizedExample], weight: float) -> torch.Tensor:
    """Of a step, by sequences read one at a time, each put to the image of the one half a step away by hand."""

    def nats(sample: TokenizedExample) -> torch.Tensor:
        return task(**pack([sample], SOURCES))

    half, loss = len(step) // 2, torch.zeros(())
    for k, sample in enumerate(step):
        other = step[(k + half) % len(step)]
        tokens, own = int(sample.supervised.sum()), nats(sample)
        loss = loss + own
        if seen(other) != seen(sample):
            spans = tuple(a._replace(reference=b.reference) for a, b in zip(sample.spans, other.spans, strict=True))
            saved = (nats(replace(sample, spans=spans)) - own) / tokens
            loss = loss + weight * tokens * SOFT * torch.log1p(torch.exp((MARGIN - saved) / SOFT))
    return loss


@pytest.mark.parametrize("layout", ["rows", "line", "alone"])
@pytest.mark.parametrize("plain_head", [True, False])
def test_loss_and_gradients_are_those_of_sequences_read_alone(layout: str, plain_head: bool) -> None:
    steps = PackedStepDataset(
        samples(), SOURCES, packs_per_step=1, layout=Layout(layout), views=2, contrast=0.7, contrast_from=2, **SHAPE
    )
    for step in (2, 3):
        reference, task = model(), model()
        task._plain_head = plain_head
        expected = expected_loss(reference, steps.step(step), 0.7)
        expected.backward()
        found = task(**steps[step])
        found.backward()
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        for one, other in zip(gradients(task), gradients(reference), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert float(steps[step]["step_tokens"]) == sum(int(s.supervised.sum()) for s in steps.step(step))


def test_it_begins_when_it_shall() -> None:
    settings = TrainingSettings(**SHAPE)
    steps = packed_dataset(samples(), SOURCES, settings, contrast=1.0, contrast_from=0.5)
    assert ["foils" in steps[step] for step in range(4)] == [False, False, True, True]
    plain = packed_dataset(samples(), SOURCES, settings)
    assert not any("foils" in plain[step] for step in range(4))
    assert steps.supervised() == plain.supervised()


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_processes_share_a_step_of_foils(processes: int) -> None:
    one = PackedStepDataset(samples(), SOURCES, packs_per_step=1, contrast=0.7, **SHAPE)
    more = PackedStepDataset(samples(), SOURCES, packs_per_step=processes, contrast=0.7, **SHAPE)
    for step in range(2):
        whole, parts = model(), model()
        whole(**one[step]).backward()
        loss = torch.stack([parts(**more[step * processes + k]) for k in range(processes)]).sum()
        loss.backward()
        if processes == 5:  # Three pairs do not fill them: each sequence stands alone.
            assert not any("foils" in more[step * processes + k] for k in range(processes))
            continue
        assert loss.item() == pytest.approx(whole(**one[step]).item(), rel=1e-5)
        for a, b in zip(gradients(parts), gradients(whole), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_right_image_is_worth_more_after_it() -> None:
    def saved(contrast: float) -> float:
        task = model()
        steps = PackedStepDataset(samples(), SOURCES, packs_per_step=1, contrast=contrast, **{**SHAPE, "steps": 15})
        optimizer = torch.optim.AdamW(task.projectors.parameters(), lr=3e-3)
        for step in range(15):
            (task(**steps[step]) / steps[step]["step_tokens"]).backward()
            optimizer.step()
            optimizer.zero_grad()
        units = pair_hard_negatives(samples())
        with torch.no_grad():
            return sum(
                (task(**pack([u.samples[foil]], SOURCES)) - task(**pack([u.samples[own]], SOURCES))).item()
                for u in units
                for foil, own in u.foils
            )

    assert saved(1.0) > 1.1 * saved(0.0)


@pytest.mark.parametrize("learned", [False, True])
def test_losses_of_positions_may_be_weighed(learned: bool) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(1500, 8, requires_grad=True), torch.randn(50, 8), torch.randn(50)
    targets, weights = torch.randint(50, (1500,)), torch.randn(1500)
    weight.requires_grad_(learned)
    found = linear_cross_entropy(hidden, weight, bias, targets, each=True)
    ((found * weights).sum()).backward()
    own, by_weight = hidden.grad.clone(), None if weight.grad is None else weight.grad.clone()
    hidden.grad = weight.grad = None
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")
    ((expected * weights).sum()).backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(own, hidden.grad)
    if learned:
        torch.testing.assert_close(by_weight, weight.grad)


def test_the_lowest_loss_is_not_looked_for_where_some_of_it_is_given_up() -> None:
    check_training("qlora", ConversationSettings(result="best"))
    check_training("qlora", ConversationSettings(contrastive_weight=0.5))
    with pytest.raises(SettingsError, match=r"qlora\.contrast"):
        check_training("qlora", ConversationSettings(contrastive_weight=0.5, checkpoint_selection="best"))
