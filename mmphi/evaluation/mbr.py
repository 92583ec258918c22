"""Minimum Bayes risk selection among several captions of an image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocoevalcap.cider.cider import Cider

from mmphi.evaluation.ptb_tokenize import ptb_text


def mbr_caption(candidates: Sequence[Sequence[str]]) -> list[int]:
    """Minimum Bayes risk decoding (Kumar and Byrne 2004) with CIDEr-D as the gain (as Devlin et al. 2015 for captions).

    Samples of a small model are often wrong in one detail, which differs between samples. Details that most samples
    share are likelier to be correct, and CIDEr gives more weight to those that occur for few other images.

    Args:
        candidates: Captions of each image, equally many, of two or more images (document frequencies come from them).

    Returns:
        Index of the selected caption of each image; the first of equally good ones.
    """
    fellows = {i: [ptb_text(caption) for caption in group] for i, group in enumerate(candidates)}
    if not any(caption for group in fellows.values() for caption in group):
        return [0] * len(candidates)
    gains = [
        Cider().compute_score(fellows, {i: [group[k]] for i, group in fellows.items()})[1]
        for k in range(len(candidates[0]))
    ]
    chosen: list[int] = np.stack(gains, axis=1).argmax(axis=1).tolist()
    return chosen
