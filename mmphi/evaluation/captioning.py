"""Captions against references: CIDEr by pycocoevalcap, BLEU-4 by sacrebleu."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pycocoevalcap.cider.cider import Cider
from sacrebleu.metrics.bleu import BLEU

WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")


def words(caption: str) -> str:
    """Lower case, no punctuation: what COCO's evaluation keeps after its Java tokenizer, without Java."""
    return " ".join(WORD.findall(caption.lower()))


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D (Vedantam et al. 2015), 0 to 10; document frequencies come from the references given.

    Args:
        predictions: One caption per image.
        references: One or more captions of each image.
    """
    given = {i: [words(p)] for i, p in enumerate(predictions)}
    wanted = {i: [words(r) for r in refs] for i, refs in enumerate(references)}
    return float(Cider().compute_score(wanted, given)[0])


def bleu4(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 (Papineni et al. 2002) on the same words, 0 to 100.

    Args:
        predictions: One caption per image.
        references: One or more captions of each image.
    """
    most = max(map(len, references))
    # Where an image has fewer references than others its first one stands again, which changes no count.
    columns = [[words(refs[k] if k < len(refs) else refs[0]) for refs in references] for k in range(most)]
    return float(BLEU(tokenize="none", force=True).corpus_score([words(p) for p in predictions], columns).score)
