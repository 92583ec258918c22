"""Image-text retrieval with a CLIP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RANKS = (1, 5, 10)


def recall(image_ND: Tensor, text_MD: Tensor, image_of_text: Sequence[int]) -> dict[str, float]:
    """Return recall at 1, 5 and 10 in both directions, as in Karpathy and Fei-Fei (2015).

    A caption is a hit if its image is among the k nearest; an image is a hit if any of its captions is.

    Args:
        image_ND: Embeddings of N images, of unit length.
        text_MD: Embeddings of M captions, of unit length.
        image_of_text: Index of each caption's image, M values.

    Returns:
        ``image_to_text_recall_at_K`` and ``text_to_image_recall_at_K``, between 0 and 1.
    """
    owner_M = torch.as_tensor(image_of_text)
    similarity_NM = image_ND @ text_MD.T
    recalls = {}
    for k in RANKS:
        nearest_texts = similarity_NM.topk(min(k, len(text_MD)), dim=1).indices
        hits = (owner_M[nearest_texts] == torch.arange(len(image_ND))[:, None]).any(dim=1)
        recalls[f"image_to_text_recall_at_{k}"] = hits.float().mean().item()
        nearest_images = similarity_NM.topk(min(k, len(image_ND)), dim=0).indices
        recalls[f"text_to_image_recall_at_{k}"] = (nearest_images == owner_M[None]).any(dim=0).float().mean().item()
    return recalls
