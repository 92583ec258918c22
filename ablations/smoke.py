"""``mmphi ablate STUDY --smoke``: the whole study at its smallest size, to see whether every part of it works."""

from __future__ import annotations

from dataclasses import replace

from ablations.study import Study
from mmphi.config.fields import leaves
from mmphi.config.smoke import smoke

SEEDS = 2


def smoke_study(study: Study) -> Study:
    """The study with two seeds, one tuning seed and the settings of a smoke run.

    Args:
        study: Its factor, nuisance settings, seeds, and settings in ``fixed`` keep their values.

    Raises:
        SettingsError: If the settings of the baseline are not valid.
    """
    settings = study.settings(study.baseline)
    varied = {study.factor, *study.fields, *study.nuisance, *study.seed_settings, *study.replicate}
    kept = varied | set(study.fixed)
    before, after = dict(leaves(settings)), dict(leaves(smoke(settings, kept)))
    budget = f"{study.stage}.supervised_tokens"
    changed = {name: value for name, value in after.items() if value != before[name] and name not in {*kept, budget}}
    return replace(
        study,
        fixed={**study.fixed, **changed},
        tokens=0,
        tuning_tokens=0,
        tuning_seeds=study.tuning_seeds[:1],
        tuning_extensions=0,
        seeds=min(study.seeds, SEEDS),
        looks=(),
    )
