"""Samples training examples in given proportions."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from mmphi.config.shared import DataSettings
from mmphi.data.schema import Example
from mmphi.errors import SettingsError

TEXT = "text"  # Group of rows without an image.


def mixture_indices(sources: Sequence[str], data: DataSettings) -> list[int]:
    """Returns indices of training examples, in the proportions of their sources' weights (:func:`sample_by_weight`).

    Args:
        sources: Source of every training example.
        data: Settings with the weights and the seed.
    """
    if len(data.sources) < 2:
        return list(range(len(sources)))
    return sample_by_weight(sources, {s.name or s.kind: s.weight for s in data.sources}, data.split_seed)


def sample_by_weight(groups: Sequence[str], weights: Mapping[str, float], seed: int) -> list[int]:
    """Returns indices of examples, in the proportions of the weights of their groups.

    Their number is, up to rounding, that of all examples in weighted groups. Each group is repeated completely, and a
    random sample of it fills the rest of its share.

    Args:
        groups: Group of every example; groups without a weight are left out.
        weights: Weight of each group, in order.
        seed: Seed of the sample and the order.

    Returns:
        Indices of examples, some repeated.
    """
    of_group: dict[str, list[int]] = {name: [] for name in weights}
    for index, name in enumerate(groups):
        if name in of_group:
            of_group[name].append(index)
    weights = {name: weight for name, weight in weights.items() if of_group[name]}
    count, total = sum(map(len, of_group.values())), sum(weights.values())
    rng = random.Random(seed)
    chosen: list[int] = []
    for name, weight in weights.items():
        have, share = of_group[name], round(count * weight / total)
        chosen += have * (share // len(have)) + rng.sample(have, share % len(have))
    rng.shuffle(chosen)
    return chosen


def parse_weights(text: str, setting: str) -> dict[str, float]:
    """Parse comma-separated weights of groups.

    >>> parse_weights("caption=1, questions=2.5", "qlora.mixture")
    {'caption': 1.0, 'questions': 2.5}

    Args:
        text: Pairs ``group=weight``, separated by commas.
        setting: Name of the setting, for messages.

    Raises:
        SettingsError: If a part is malformed, or a weight is not positive and finite.
    """
    weights: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (word.strip() for word in part.rpartition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not name or not 0 < weight < float("inf"):
            raise SettingsError(f"{setting}: {part!r} is not of the form group=weight", "write caption=1, questions=2")
        weights[name] = weight
    return weights


def names_of(example: Example) -> list[str]:
    """Returns the groups of an example in a mixture, the most specific first.

    These are source and kind (``scenes:caption``), ``text`` for an example without image, the kind, and the source.
    """
    kind = example.attributes.get("kind", "")
    names = [f"{example.source}:{kind}", TEXT if not example.images else "", kind, example.source]
    return [name for name in dict.fromkeys(names) if name]


def grouped(examples: Sequence[Example], weights: Mapping[str, float], setting: str) -> list[str]:
    """Returns the group of every example; empty if none of its groups has a weight.

    Args:
        examples: Examples to mix.
        weights: Weight of each group.
        setting: Name of the setting, for messages.

    Raises:
        SettingsError: If a group has no example; the message lists the existing groups.
    """
    groups = [next((name for name in names_of(example) if name in weights), "") for example in examples]
    empty = [name for name in weights if name not in groups]
    if empty:
        there = sorted({name for example in examples for name in names_of(example)})
        raise SettingsError(
            f"{setting}: no training row is in the group {empty[0]!r}", f"the groups are {', '.join(there)}"
        )
    return groups
