"""``mmphi ablate``: runs or resumes a study or a search."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ablations import study as studies
from ablations.dry_run import without_tuning
from ablations.smoke import smoke_study
from ablations.study import Study
from mmphi.config.arguments import CommandParser
from mmphi.errors import SettingsError

EPILOG = "Further options change settings at all levels, for example --projector.batch_size 64"


def ablate(arguments: Sequence[str]) -> int:
    """``mmphi ablate STUDY``: run a study, or resume it."""
    parser = CommandParser(
        prog="mmphi ablate",
        description="Run a study or a search, or resume it.",
        epilog=EPILOG,
    )
    parser.add_argument("study", help=f"{', '.join(studies.names())}, or a Python file that defines STUDY")
    parser.add_argument("--preset", default="", help="another preset than the study's own")
    parser.add_argument(
        "--name", default="", help="name of the study in the store [the study's name; with --preset NAME.PRESET]"
    )
    parser.add_argument("--workers", type=int, default=0, help="number of worker processes [one per GPU, or 1]")
    parser.add_argument("--storage", default="", help="URL of Optuna's storage: postgresql+psycopg://... [SQLite]")
    parser.add_argument("--seeds", type=int, help="number of paired seeds [as declared]")
    parser.add_argument("--trials", type=int, help="number of trials of a search [as declared]")
    parser.add_argument("--tokens", type=int, help="budget of a trial in supervised tokens")
    parser.add_argument("--levels", help="only these levels, separated by commas")
    parser.add_argument("--retries", type=int, default=5, help="how many times a crashed trial is repeated [5]")
    parser.add_argument(
        "--no-tuning", action="store_true", help="do not tune: use the preset's nuisance values at all levels"
    )
    parser.add_argument("--dry-run", action="store_true", help="show every trial and the time, and train nothing")
    parser.add_argument(
        "--smoke", action="store_true", help="two seeds of a few steps, under another name, to see whether all works"
    )
    options, rest = parser.parse_known_args(list(arguments))
    options.storage = "" if options.storage == "preset" else options.storage
    name, study = studies.load(options.study, "" if options.preset == "preset" else options.preset)
    study = adjust_study(study, options, rest)
    name = options.name or (f"{name}.smoke" if options.smoke else name)
    if options.dry_run:
        return _dry_run(name, study, options.workers)
    from ablations.run import run

    return run(
        name,
        study,
        workers=options.workers,
        storage=options.storage,
        retries=options.retries,
        run_id=os.environ.get("MLFLOW_RUN_ID", ""),
        command=shlex.join(["mmphi", "ablate", *arguments]),
    )


def _dry_run(name: str, study: Any, workers: int) -> int:
    from ablations.dry_run import lines
    from ablations.worker_pool import visible_gpus
    from mmphi.tracking.run_writer import TrackingStore

    study.check()
    print(study.question)
    if isinstance(study, Study):
        print("\n".join(lines(name, study, TrackingStore(), workers or max(1, len(visible_gpus())))))
    else:
        print(study.summary())
    return 0


def adjust_study(study: Any, options: argparse.Namespace, rest: Sequence[str]) -> Any:
    """Apply the command line's options and settings to a study or search.

    Args:
        study: Study or search as its file declares it.
        options: Parsed options of ``mmphi ablate``.
        rest: Arguments that are settings, such as ``--projector.batch_size 64``.

    Raises:
        SettingsError: If an option is unknown, does not apply, or names a level that does not exist.
    """
    from mmphi.cli import parse
    from mmphi.config.overrides import full_name
    from mmphi.stages import Settings

    flags, fixed = parse(rest)
    if flags:
        raise SettingsError(f"unknown option --{next(iter(flags))}", "`mmphi ablate --help` lists them")
    if options.seeds is not None:
        many = options.seeds if isinstance(study, Study) else tuple(range(options.seeds))
        study = replace(study, seeds=many)
    if options.trials is not None:
        if isinstance(study, Study):
            raise SettingsError("a study has levels and seeds, not --trials", "give --seeds or --levels")
        study = replace(study, trials=options.trials)
    if options.tokens is not None:
        study = replace(study, tokens=options.tokens)
    if options.levels and options.levels != "preset":
        if not isinstance(study, Study):
            raise SettingsError("a search has a space, not --levels", "give --trials or --seeds")
        wanted = parse_levels(study, options.levels)
        study = replace(study, levels={level: study.levels[level] for level in wanted})
    if options.no_tuning:
        if not isinstance(study, Study):
            raise SettingsError("a search has no tuning phase", "leave --no-tuning out")
        study = without_tuning(study)
    named = {full_name(Settings, key, study.stage): value for key, value in fixed.items()}
    study = replace(study, fixed={**study.fixed, **named}) if named else study
    if options.smoke and not isinstance(study, Study):
        raise SettingsError("a search has no smoke run", "give --trials 2 and few --tokens")
    return smoke_study(study) if options.smoke else study


def parse_levels(study: Study, text: str) -> list[str]:
    """Parse comma-separated level names; a name may itself contain commas.

    Raises:
        SettingsError: If a level does not exist.
    """
    parts, found = [part.strip() for part in text.split(",")], []
    while parts:
        # The longest match wins.
        names = [", ".join(parts[:end]) for end in range(len(parts), 0, -1)]
        name = next((name for name in names if name in study.levels), None)
        if name is None:
            mark = "; " if any("," in level for level in study.levels) else ", "
            raise SettingsError(f"there is no level {parts[0]!r}", f"the levels are {mark.join(study.levels)}")
        found.append(name)
        parts = parts[name.count(", ") + 1 :]
    return found
