"""Tags that distinguish runs of studies from runs that a user requested; light to import."""

STUDY = "mmphi.study"  # On a trial's run: name of its study.
FOR_STUDY = "mmphi.for_study"  # On a run built as input of a trial: name of the trial's study.
REQUESTED = "mmphi.requested"  # On a result that a user has requested as well.
