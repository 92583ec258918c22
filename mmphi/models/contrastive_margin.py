"""Contrastive margin loss: an answer should have a higher loss after the image of another example."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from mmphi.text.packing import PackedBatch

MARGIN = 1.5  # Nats per token by which the right image should lower the loss.
SOFT = 0.5  # Temperature of the softplus, in nats per token.


def contrastive_margin_loss(losses_K: Tensor, pack: PackedBatch) -> Tensor:
    """Summed loss of the sequences with their own images plus a margin penalty, in nats, shape ().

    Each sequence with a hard negative adds ``contrast * tokens * SOFT * softplus((MARGIN - saved) / SOFT)``, where
    ``saved`` is the difference in loss per token between the other image and its own. See Dai and Lin 2017
    (arXiv:1710.02534) for contrastive captioning.

    Args:
        losses_K: Loss of each supervised token, in nats.
        pack: Batch with ``samples``, ``sequences``, ``foils`` and ``contrast``.
    """
    sequences_K, foils_F2 = pack["sequences"], pack["foils"]
    summed = torch.zeros(pack["samples"], device=losses_K.device).index_add(0, sequences_K, losses_K)
    tokens = torch.zeros_like(summed).index_add(0, sequences_K, torch.ones_like(losses_K))
    foils, own = foils_F2.unbind(dim=1)
    saved = (summed[foils] - summed[own]) / tokens[own].clamp(min=1)
    missing = tokens[own] * SOFT * F.softplus((MARGIN - saved) / SOFT)
    return summed.sum() - summed[foils].sum() + pack["contrast"] * missing.sum()
