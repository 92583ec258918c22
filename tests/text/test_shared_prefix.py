"""Conversations about one image share its tokens: the loss and its gradients are those of each alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from builders import RandomFeatures, encode, example, tiny_language

from mmphi.models.packed_vlm import PackedVLM, block_causal_mask
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.text.packing import Layout, PackedBatch, pack, packs
from mmphi.text.shared_prefix import group_by_shared_prefix
from mmphi.text.tokenized_example import TokenizedExample
from mmphi.training.packed_dataset import PackedStepDataset

SOURCES = {"image": RandomFeatures()}
LANGUAGE = tiny_language()
SAID = [
    (1, "", "a dog"),
    (1, "", "two dogs run"),
    (1, "is it?", "yes"),
    (2, "", "snow"),
    (1, "", "again"),
    (3, "", "x"),
]


def samples(said: list[tuple[int, str, str]] = SAID) -> list[TokenizedExample]:
    return [encode(example(i, answer, question), LANGUAGE.prompt, 4, 200) for i, question, answer in said]


def text(answer: str) -> TokenizedExample:
    return encode(example(0, answer, image=False), LANGUAGE.prompt, 4, 200)


def model() -> PackedVLM:
    torch.manual_seed(1)
    return PackedVLM(LANGUAGE.model, image=Projector(ProjectorConfig(RandomFeatures.width, 32)))


def learned(rows: list[PackedBatch]) -> tuple[float, list[torch.Tensor]]:
    """Summed loss and its gradients."""
    task = model()
    loss = torch.stack([task(**each) for each in rows]).sum()
    loss.backward()
    return loss.item(), [p.grad for p in task.projectors.parameters()]


def test_neighbours_that_see_the_same_are_bundled() -> None:
    given = [*samples(), text("one"), text("two")]
    bundles = group_by_shared_prefix(given)
    assert [b.members for b in bundles] == [(0, 1, 2), (3,), (4,), (5,), (6,), (7,)]  # Texts see nothing to share.
    assert bundles[0].alike == 5  # The first token and four of the image: one of the three continues with a question.
    assert group_by_shared_prefix(given[:2])[0].alike == int(given[0].supervised.argmax())
    assert bundles[0].length(given) == 5 + sum(len(s) - 5 for s in given[:3])
    assert [b.members for b in group_by_shared_prefix(given, share=False)] == [(i,) for i in range(8)]


@pytest.mark.parametrize("layout", ["rows", "line", "alone"])
def test_shared_equals_alone(layout: str) -> None:
    given = [*samples(), text("one"), text("two")]
    expected, gradients = learned([pack([sample], SOURCES) for sample in given])
    shared = pack(given, SOURCES, layout=Layout(layout), share=True)
    assert ("branches" in shared) == (layout == "rows")
    loss, found = learned([shared])
    assert loss == pytest.approx(expected, rel=1e-5)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    if layout == "rows":
        assert len(shared["features"]["image"]) == 4 * 4  # Of six conversations about four images, one met twice.
        assert int((shared["segments"] >= 0).sum()) == sum(map(len, given)) - 2 * 5


def test_answers_do_not_see_each_other() -> None:
    given = samples()
    rows = pack(given, SOURCES, share=True)
    mask = block_causal_mask(rows["segments"], rows["branches"])[0, 0]
    branches, segments = rows["branches"][0], rows["segments"][0]
    for query in range(len(mask)):
        for key in range(len(mask)):
            sees = segments[query] == segments[key] and key <= query and branches[key] in (0, branches[query])
            assert bool(mask[query, key]) == bool(sees)
    changed = [given[0], samples([(1, "", "otherwise")])[0], *given[2:]]
    logits, other = (model().logits(pack(some, SOURCES, rows=None, share=True)) for some in (given, changed))
    end = int(given[0].supervised.sum())
    torch.testing.assert_close(logits[:end], other[:end])
    last = int(given[-1].supervised.sum())
    torch.testing.assert_close(logits[-last:], other[-last:])


def test_a_model_is_scored_as_it_is_alone() -> None:
    shared = list(packs(samples(), SOURCES, 30))
    assert len(shared) > 1
    assert any("branches" in each for each in shared)
    assert learned(shared)[0] == pytest.approx(learned([pack([s], SOURCES) for s in samples()])[0], rel=1e-5)


def test_steps_keep_what_is_about_an_image_together() -> None:
    given = samples([(image, "", letter) for image in range(6) for letter in "abcde"])
    steps = PackedStepDataset(
        given, SOURCES, steps=30, batch_size=6, packs_per_step=1, seed=3, views=2, max_examples_per_image=3
    )
    seen = [sample for step in range(10) for sample in steps.step(step)]  # Twice all 30.
    count = Counter((s.spans[0].reference.view, s.spans[0].reference.id, s.input_ids.tobytes()) for s in seen)
    assert len(count) == 60  # Each once as it is and once as another view.
    assert [len(b.members) for b in group_by_shared_prefix(steps.step(0))] in (
        [3, 3],
        [3, 2, 1],
        [2, 3, 1],
        [2, 2, 2],
        [3, 1, 2],
    )
    orders = [[s.spans[0].reference.id for s in steps.step(step)] for step in (0, 5, 10)]
    assert orders[0] != orders[1] != orders[2]
    alone = PackedStepDataset(given, SOURCES, steps=30, batch_size=6, packs_per_step=1, seed=3, views=2)
    assert "branches" not in alone[0]
    assert "branches" in steps[0]


@pytest.mark.parametrize("batch_size", [6, 2])
def test_processes_share_a_step_of_bundles(batch_size: int) -> None:
    given = samples([(image, "", letter) for image in range(6) for letter in "abcde"])
    shape = {"steps": 3, "batch_size": batch_size, "seed": 3, "max_examples_per_image": 5}
    one = PackedStepDataset(given, SOURCES, packs_per_step=1, **shape)
    two = PackedStepDataset(given, SOURCES, packs_per_step=2, **shape)
    for step in range(3):
        whole, gradients = learned([one[step]])
        parts, found = learned([two[2 * step], two[2 * step + 1]])
        assert parts == pytest.approx(whole, rel=1e-5)
        for a, b in zip(found, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
