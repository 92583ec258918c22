"""Groups of sequences with a common prefix, which is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mmphi.text.tokenized_example import TokenizedExample


class SharedPrefixGroup(NamedTuple):
    """Sequences with a shared prefix; the rest of each attends to the prefix, and not to the other sequences.

    Attributes:
        members: Indices of the sequences.
        alike: Length of the shared prefix, in tokens.
    """

    members: tuple[int, ...]
    alike: int

    def length(self, samples: Sequence[TokenizedExample]) -> int:
        """Return the total number of tokens, with the prefix counted once."""
        return self.alike + sum(len(samples[i]) - self.alike for i in self.members)


def group_by_shared_prefix(samples: Sequence[TokenizedExample], share: bool = True) -> list[SharedPrefixGroup]:
    """Group adjacent sequences with equal feature spans and equal tokens up to the end of the last span.

    Args:
        samples: Sequences in order.
        share: Whether to share prefixes; otherwise each sequence is a group with no shared prefix.
    """
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
