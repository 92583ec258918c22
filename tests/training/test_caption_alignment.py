"""Features learn to name words of captions: the loss is that of a mixture of places, and where words are is found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from builders import RandomFeatures, tiny_language

from mmphi.data.schema import ImageRef
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.training import caption_alignment as module
from mmphi.training.caption_alignment import (
    BagOfWordsAlignmentLoss,
    CaptionAlignmentDataset,
    CaptionWords,
    alignment_loss,
    caption_words,
    collate,
    match_embedding_norm,
    word_frequencies,
)

FEATURES = RandomFeatures()
IMAGES = [
    CaptionWords(ImageRef(str(i), Path(str(i))), words, counts)
    for i, (words, counts) in enumerate([((0, 2), (3, 1)), ((1,), (2,)), ((0, 1, 3), (1, 1, 1)), ((3,), (5,))])
]


def task(seed: int = 0) -> BagOfWordsAlignmentLoss:
    torch.manual_seed(seed)
    projector = Projector(ProjectorConfig(FEATURES.width, 8))
    return BagOfWordsAlignmentLoss(projector, torch.randn(4, 8), torch.tensor([4.0, 3.0, 1.0, 6.0]))


def by_hand(naming: BagOfWordsAlignmentLoss, image: CaptionWords) -> float:
    """A place names a word by its share of usage times the exponential of a scaled cosine; an image is their mean."""
    places = naming.projector(FEATURES.get([image.image])[0])
    nats = 0.0
    for word, count in zip(image.words, image.counts, strict=True):
        share = 0.0
        for place in places:
            weights = [
                float(usage) * math.exp((torch.cosine_similarity(place, other, dim=0) * naming.sharpness.exp()).item())
                for other, usage in zip(naming.words, [4, 3, 1, 6], strict=True)
            ]
            share += weights[word] / sum(weights) / len(places)
        nats -= count * math.log(share)
    return nats


def test_the_loss_is_that_of_a_mixture_of_places() -> None:
    naming = task()
    assert naming(**collate(IMAGES, FEATURES)).item() == pytest.approx(
        sum(by_hand(naming, i) for i in IMAGES), rel=1e-4
    )
    assert alignment_loss(naming, IMAGES, FEATURES, at_once=3) == pytest.approx(
        sum(by_hand(naming, i) for i in IMAGES) / 14, rel=1e-4
    )


def test_scores_in_parts_are_those_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for room in (1 << 20, 1):
        monkeypatch.setattr(module, "AT_ONCE", room)
        naming = task()
        loss = naming(**collate(IMAGES, FEATURES))
        loss.backward()
        found.append((loss.item(), *[p.grad for p in naming.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for whole, parts in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(whole, parts)


class Things(RandomFeatures):
    """Features of a thing at one place, and of nothing at the others."""

    def get(self, images: Sequence[ImageRef]) -> torch.Tensor:
        rows = torch.zeros(len(images), self.tokens, self.width, dtype=torch.float16)
        for i, image in enumerate(images):
            number = int(image.id)
            for thing in (number % 4, (number // 4 + 1 + number) % 4):
                rows[i, (number + thing) % self.tokens, thing] = 1
        return rows


def test_it_finds_where_things_are_that_captions_only_name() -> None:
    images = []
    for number in range(12):
        things = sorted({number % 4, (number // 4 + 1 + number) % 4})
        images.append(CaptionWords(ImageRef(str(number), Path("x")), tuple(things), (1,) * len(things)))
    torch.manual_seed(0)
    naming = BagOfWordsAlignmentLoss(
        Projector(ProjectorConfig(FEATURES.width, 8)), torch.eye(8)[:4], word_frequencies(images, 4)
    )
    optimizer = torch.optim.AdamW(naming.parameters(), lr=0.02)
    before = alignment_loss(naming, images, Things())
    steps = CaptionAlignmentDataset(images, Things(), steps=120, batch_size=6, seed=0)
    for step in range(len(steps)):
        optimizer.zero_grad()
        batch = steps[step]
        (naming(**batch) / batch["step_tokens"]).backward()
        optimizer.step()
    assert alignment_loss(naming, images, Things()) < before - 0.3
    seen = Things().get([one.image for one in images])
    named = naming.places(seen.float()).argmax(dim=-1)
    there = seen.sum(dim=-1) == 1  # Two things at one place are told by neither alone.
    assert torch.equal(named[there], seen.argmax(dim=-1)[there])


def test_processes_share_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, naming = CaptionAlignmentDataset(IMAGES, FEATURES, steps=3, batch_size=3, seed=1), task()
    one = [naming(**whole[i]).item() / float(whole[i]["step_tokens"]) for i in range(len(whole))]
    monkeypatch.setattr(module, "world_size", lambda: 2)
    assert len(whole) == 6
    parts = [naming(**whole[i]).item() / float(whole[i]["step_tokens"]) for i in range(6)]
    assert [parts[0] + parts[1], parts[2] + parts[3], parts[4] + parts[5]] == pytest.approx(one, rel=1e-5)


def test_views_take_turns() -> None:
    class Views(RandomFeatures):
        def get(self, images: Sequence[ImageRef]) -> torch.Tensor:
            asked.append([(int(i.id), i.view) for i in images])
            return super().get(images)

    asked: list[list[tuple[int, int]]] = []
    steps = CaptionAlignmentDataset(IMAGES, Views(), steps=6, batch_size=2, seed=0, views=3)
    for index in range(len(steps)):
        steps[index]
    seen = [pair for step in asked for pair in step]
    assert sorted(seen) == [(image, view) for image in range(4) for view in range(3)]


def test_words_are_the_tokens_that_most_captions_use(monkeypatch: pytest.MonkeyPatch) -> None:
    language = tiny_language()
    images = [
        (ImageRef("a", Path("a")), ["xx", "xy"]),
        (ImageRef("b", Path("b")), ["y"]),
        (ImageRef("c", Path("c")), []),
    ]
    known, found = caption_words(language, images)
    named = [{language.tokenizer.decode(known[w]): n for w, n in zip(i.words, i.counts, strict=True)} for i in found]
    assert named == [{" ": 2, "x": 2, "y": 1}, {" ": 1, "y": 1}]  # Twice in one caption counts once.
    monkeypatch.setattr(module, "WORDS", 2)
    some, fewer = caption_words(language, images)
    assert sorted(language.tokenizer.decode(t) for t in some) == [" ", "x"]
    assert [i.image.id for i in fewer] == ["a", "b"]
    _, others = caption_words(language, [(ImageRef("d", Path("d")), ["zy"]), (ImageRef("e", Path("e")), ["x"])], known)
    assert [sum(i.counts) for i in others] == [2, 2]
    assert word_frequencies(found, len(known) + 1).tolist() == pytest.approx(
        [{" ": 3.1, "x": 2.1, "y": 2.1}[language.tokenizer.decode(t)] for t in known] + [0.1]
    )


@pytest.mark.parametrize("layers", [1, 2])
def test_embeddings_become_as_large_as_words(layers: int) -> None:
    torch.manual_seed(0)
    projector = Projector(ProjectorConfig(FEATURES.width, 8, layers=layers, dropout=0.5)).train()
    features = FEATURES.get([one.image for one in IMAGES])
    before = projector.eval()(features)
    projector.train()
    match_embedding_norm(projector, features, 2.5)
    assert projector.training
    after = projector.eval()(features)
    assert after.norm(dim=-1).mean().item() == pytest.approx(2.5, rel=1e-5)
    torch.testing.assert_close(after / after.norm(), before / before.norm())
