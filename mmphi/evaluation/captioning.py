"""Caption metrics: CIDEr by pycocoevalcap and BLEU-4 by sacrebleu, both on COCO's tokenization."""

from __future__ import annotations

from collections.abc import Sequence

from pycocoevalcap.cider.cider import Cider
from sacrebleu.metrics.bleu import BLEU

from mmphi.evaluation.ptb_tokenize import ptb_text


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return CIDEr-D (Vedantam et al. 2015), 0 to 10; document frequencies come from ``references``.

    Args:
        predictions: One caption per image.
        references: One or more captions of each image.
    """
    candidates = {i: [ptb_text(p)] for i, p in enumerate(predictions)}
    wanted = {i: [ptb_text(r) for r in refs] for i, refs in enumerate(references)}
    if not any(text for texts in wanted.values() for text in texts):
        return 0.0  # pycocoevalcap raises an error if the references have no n-grams.
    return float(Cider().compute_score(wanted, candidates)[0])


def bleu4(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return corpus BLEU-4 (Papineni et al. 2002), 0 to 100, on the same tokenization.

    Args:
        predictions: One caption per image.
        references: One or more captions of each image.
    """
    most = max(map(len, references))
    # An image with fewer references than others repeats its first one, which changes no count.
    columns = [[ptb_text(refs[k] if k < len(refs) else refs[0]) for refs in references] for k in range(most)]
    return float(BLEU(tokenize="none", force=True).corpus_score([ptb_text(p) for p in predictions], columns).score)
