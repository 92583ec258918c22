"""Sequences that begin alike, and are read once up to where they part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mmphi.text.tokenized_example import TokenizedExample


class SharedPrefixGroup(NamedTuple):
    """Sequences that begin alike, and may share that beginning: what comes after sees it, and nothing of the others.

    Attributes:
        members: Of the sequences, by index.
        alike: Tokens that they share.
    """

    members: tuple[int, ...]
    alike: int

    def length(self, samples: Sequence[TokenizedExample]) -> int:
        """Tokens in all."""
        return self.alike + sum(len(samples[i]) - self.alike for i in self.members)


def group_by_shared_prefix(samples: Sequence[TokenizedExample], share: bool = True) -> list[SharedPrefixGroup]:
    """Neighbours that see and hear the same, with the same words before and around it; without ``share`` each alone."""
    bundles: list[SharedPrefixGroup] = []
    for index, sample in enumerate(samples):
        given = int(sample.supervised.argmax()) if share else 0
        seen = max((span.start + span.length for span in sample.spans), default=given + 1)
        if bundles and seen <= given:
            members, alike = bundles[-1]
            first = samples[members[0]]
            alike = min(alike, given)
            same = first.input_ids[:alike] == sample.input_ids[:alike]
            alike = alike if same.all() else int(same.argmin())
            if seen <= alike and first.spans == sample.spans:
                bundles[-1] = SharedPrefixGroup((*members, index), alike)
                continue
        bundles.append(SharedPrefixGroup((index,), given if seen <= given else 0))
    return bundles
