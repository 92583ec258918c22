"""Negative control: the levels have the same settings, so no difference may be found."""

from ablations.study import CURVES, Study

STUDY = Study(
    question="Does the suite report a difference where there is none?",
    factor="nothing",
    fields=("projector.layers",),
    levels={"first draw": {}, "second draw": {}},
    baseline="first draw",
    shifts={"second draw": 500},
    fixed={"projector.optimizer": "adamw", **CURVES},
    tokens=150_000,
    margin=0.02,
    leaves_open="Both levels are the same settings; the second one's seeds are others, so that its trials share neither"
    " weights nor order with their pairs, and the noise is that of unpaired runs.",
)
