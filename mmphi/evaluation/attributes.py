"""Accuracy of the attributes in captions of drawn scenes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mmphi.data.scenes import COLORS, RELATIONS, SHAPES

ATTRIBUTES = ("color1", "shape1", "relation", "color2", "shape2")
CAPTION = re.compile(
    rf"a big ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) ({'|'.join(RELATIONS)}) "
    rf"a small ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
)


def parse_caption(caption: str) -> dict[str, str]:
    """Return the attributes in a caption; empty if it does not have the form of scene captions."""
    match = CAPTION.fullmatch(caption.strip())
    return dict(zip(ATTRIBUTES, match.groups(), strict=True)) if match else {}


def attribute_accuracy(captions: Sequence[str], attributes: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Return the share of correct attributes; a caption that cannot be parsed has none correct.

    Args:
        captions: Generated captions.
        attributes: True attributes of each scene.

    Returns:
        ``attribute_accuracy``, ``attribute_accuracy/NAME`` and ``exact_match`` (all attributes of a caption correct).
    """
    claimed = [parse_caption(c) for c in captions]
    right = {
        name: [claim.get(name) == drawn[name] for claim, drawn in zip(claimed, attributes, strict=True)]
        for name in ATTRIBUTES
    }
    shares = {f"attribute_accuracy/{name}": sum(hits) / len(hits) for name, hits in right.items()}
    exact = [all(hits) for hits in zip(*right.values(), strict=True)]
    return {
        "attribute_accuracy": sum(shares.values()) / len(shares),
        "exact_match": sum(exact) / len(exact),
        **shares,
    }
