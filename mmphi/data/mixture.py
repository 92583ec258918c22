"""Which examples a training takes, in the proportions that are asked for."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from mmphi.config.shared import DataSettings
from mmphi.data.schema import Example
from mmphi.errors import SettingsError

TEXT = "text"  # What rows without an image are called in a mixture.


def mixture_indices(sources: Sequence[str], data: DataSettings) -> list[int]:
    """Which training examples to take, in the proportions of their sources' weights: :func:`sample_by_weight`.

    Args:
        sources: Source of every training example.
        data: Holds weights and seed.
    """
    if len(data.sources) < 2:
        return list(range(len(sources)))
    return sample_by_weight(sources, {s.name or s.kind: s.weight for s in data.sources}, data.split_seed)


def sample_by_weight(groups: Sequence[str], weights: Mapping[str, float], seed: int) -> list[int]:
    """Which examples to take, in the proportions of the weights of their groups.

    As many as all groups with a weight have together; each group is repeated whole and then sampled, with a seed, up to
    its share.

    Args:
        groups: Group of every example; one without a weight is left out.
        weights: By group, in order.
        seed: Of the sample and the order.

    Returns:
        Indices of examples, some of them several times.
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
    """Weights as typed.

    >>> parse_weights("caption=1, questions=2.5", "qlora.mixture")
    {'caption': 1.0, 'questions': 2.5}

    Args:
        text: Groups and weights.
        setting: Where they were given, for messages.

    Raises:
        SettingsError: If a part cannot be read.
    """
    weights: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (word.strip() for word in part.rpartition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not name or not 0 < weight < float("inf"):
            raise SettingsError(f"{setting}: {part!r} is no group with a weight", "write caption=1, questions=2")
        weights[name] = weight
    return weights


def names_of(example: Example) -> list[str]:
    """What an example may be called in a mixture, the narrowest first.

    That is its source and kind (``scenes:caption``), ``text`` where it has no image, its kind, its source.
    """
    kind = example.attributes.get("kind", "")
    names = [f"{example.source}:{kind}", TEXT if not example.images else "", kind, example.source]
    return [name for name in dict.fromkeys(names) if name]


def grouped(examples: Sequence[Example], weights: Mapping[str, float], setting: str) -> list[str]:
    """The group of every example, empty where none has a weight.

    Args:
        examples: To be mixed.
        weights: By group.
        setting: Where they were given, for messages.

    Raises:
        SettingsError: If a group has no example; names those that there are.
    """
    groups = [next((name for name in names_of(example) if name in weights), "") for example in examples]
    empty = [name for name in weights if name not in groups]
    if empty:
        there = sorted({name for example in examples for name in names_of(example)})
        raise SettingsError(f"{setting}: no training row is called {empty[0]!r}", f"there are {', '.join(there)}")
    return groups
