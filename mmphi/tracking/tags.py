"""Tags that distinguish runs of studies from those that a user asked for; light to import."""

STUDY = "mmphi.study"  # Of a trial: its study.
FOR_STUDY = "mmphi.for_study"  # Of what was built because a trial needs it: the trial's study.
REQUESTED = "mmphi.requested"  # Of a result that a user has asked for as well.
