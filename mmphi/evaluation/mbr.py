"""Of several captions of an image, the one that the others agree with most."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocoevalcap.cider.cider import Cider

from mmphi.evaluation.ptb_tokenize import ptb_text


def mbr_caption(candidates: Sequence[Sequence[str]]) -> list[int]:
    """Minimum Bayes risk decoding (Kumar and Byrne 2004) with CIDEr-D as the gain (as Devlin et al. 2015 for captions).

    What a small model samples is often wrong in one detail, and each time in another: details that most samples share
    are likelier to be right, and CIDEr weighs them by how few other images they are said of.

    Args:
        candidates: Equally many captions of each image, of two or more images (document frequencies come from them).

    Returns:
        For each image the index of the caption chosen; the first among equals.
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
