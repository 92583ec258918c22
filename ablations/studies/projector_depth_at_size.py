"""Projector depth at an equal number of parameters: deeper projectors are narrower."""

from dataclasses import replace

from ablations.studies.projector_depth import STUDY as AT_WIDTH

STUDY = replace(
    AT_WIDTH,
    question="How many layers should the projector have, if its size is given?",
    levels={"2 layers": 2, "3 layers": 3, "4 layers": 4, "6 layers": 6},
    fixed={**AT_WIDTH.fixed, "projector.parameters": 400_000},
    leaves_open="A projector of one layer has no width to choose and is not among the levels.",
)
