"""The right image against another one: answers shall cost more where they are told of an image that is not theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from mmphi.text.packing import PackedBatch

MARGIN = 1.5  # Nats per token that the right image shall save.
SOFT = 0.5  # Nats per token over which it is no longer asked for more.


def contrastive_margin_loss(losses_K: Tensor, pack: PackedBatch) -> Tensor:
    """Summed loss of sequences with their own images, and of what another image does not cost them, shape ().

    The second is ``weight * tokens * SOFT * softplus((MARGIN - saved) / SOFT)`` of each sequence that has a foil, where
    ``saved`` is what the right image saves of each of its ``tokens``. Captions that a model is to tell from those of
    other images are Dai and Lin 2017 (arXiv:1710.02534).

    Args:
        losses_K: Of each supervised token, in nats.
        pack: With ``samples``, ``sequences``, ``foils`` and ``contrast``.
    """
    sequences_K, foils_F2 = pack["sequences"], pack["foils"]
    summed = torch.zeros(pack["samples"], device=losses_K.device).index_add(0, sequences_K, losses_K)
    tokens = torch.zeros_like(summed).index_add(0, sequences_K, torch.ones_like(losses_K))
    foils, own = foils_F2.unbind(dim=1)
    saved = (summed[foils] - summed[own]) / tokens[own].clamp(min=1)
    missing = tokens[own] * SOFT * F.softplus((MARGIN - saved) / SOFT)
    return summed.sum() - summed[foils].sum() + pack["contrast"] * missing.sum()
