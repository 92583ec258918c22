"""Mixtures by group."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from mmphi.data.mixture import grouped, names_of, parse_weights, sample_by_weight
from mmphi.data.schema import Example, ImageRef, Turn
from mmphi.errors import SettingsError

IMAGE = (ImageRef("a/1.png", Path("1.png")),)
TURNS = (Turn("what?", "that"),)


def row(source: str, kind: str, images: tuple[ImageRef, ...] = IMAGE) -> Example:
    return Example("1", images, TURNS, source, attributes={"kind": kind})


def test_shares_are_those_of_the_weights():
    groups = ["a"] * 30 + ["b"] * 10 + ["", "c"] * 5
    chosen = sample_by_weight(groups, {"a": 1.0, "b": 3.0}, seed=0)
    assert Counter(groups[i] for i in chosen) == {"a": 10, "b": 30}
    assert set(Counter(i for i in chosen if groups[i] == "b").values()) == {3}
    assert (
        chosen
        == sample_by_weight(groups, {"a": 1.0, "b": 3.0}, seed=0)
        != sample_by_weight(groups, {"a": 1.0, "b": 3.0}, seed=1)
    )
    assert chosen != sorted(chosen)


def test_a_group_without_rows_takes_no_share():
    assert Counter(sample_by_weight(["a"] * 4, {"a": 1.0, "b": 9.0}, seed=0)) == {0: 1, 1: 1, 2: 1, 3: 1}


def test_the_narrowest_name_counts():
    assert names_of(row("coco", "caption")) == ["coco:caption", "caption", "coco"]
    assert names_of(row("chat", "conversation", ())) == ["chat:conversation", "text", "conversation", "chat"]
    rows = [row("coco", "caption"), row("coco", "detail"), row("flickr", "caption"), row("chat", "conversation", ())]
    weights = {"coco": 1.0, "coco:caption": 2.0, "text": 1.0}
    assert grouped(rows, weights, "qlora.mixture") == ["coco:caption", "coco", "", "text"]


@pytest.mark.parametrize("text", ["caption", "caption=", "=1", "caption=0", "caption=nan", "caption=inf", "a=1, b=-2"])
def test_weights_that_are_none(text):
    with pytest.raises(SettingsError, match=r"qlora\.mixture"):
        parse_weights(text, "qlora.mixture")


def test_weights_as_typed():
    assert parse_weights(" scenes:caption=1 , text = .5,", "qlora.mixture") == {"scenes:caption": 1.0, "text": 0.5}
    assert parse_weights("", "qlora.mixture") == {}
