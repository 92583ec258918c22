"""``mmphi studies`` and ``mmphi compare``: show studies, change them while they run, open their MLflow pages."""

from __future__ import annotations

import contextlib
import json
import webbrowser
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mmphi.config.arguments import CommandParser
from mmphi.config.former_names import former_metric
from mmphi.errors import SettingsError

if TYPE_CHECKING:
    from ablations.study_run import StudyRun
    from mmphi.tracking.run_store import RunStore
    from reports.study_query import StudyData

MOST_COMPARED = 100  # Maximum number of runs in one URL.


def studies(arguments: Sequence[str]) -> int:
    """``mmphi studies [STUDY]``: list studies, show the progress of one, or change it while it runs."""
    parser = CommandParser(prog="mmphi studies", description="List studies; look at one; change one while it runs.")
    parser.add_argument("study", nargs="?", help="its name in the store")
    parser.add_argument("--watch", action="store_true", help="update the table until the study is complete")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between updates of --watch [5]")
    parser.add_argument("--stop", metavar="LEVEL", help="level that gets no more trials")
    parser.add_argument("--add", metavar="LEVEL", help="NAME=VALUE adds a level; NAME resumes a stopped level")
    parser.add_argument("--seeds", type=int, help="new number of seeds")
    options = parser.parse_args(list(arguments))
    from mmphi.tracking.run_writer import TrackingStore

    if not options.study:
        print(list_studies(TrackingStore()))
        return 0
    store = TrackingStore()
    if options.stop or options.add or options.seeds is not None:
        record_change_of_study(store, options.study, options.stop, options.add, options.seeds)
    from ablations.watch import progress_table, watch
    from reports.study_query import load_study

    if options.watch:
        with contextlib.suppress(KeyboardInterrupt):
            watch(store, options.study, options.every)
    else:
        print(progress_table(load_study(store, options.study)))
    return 0


def list_studies(store: RunStore) -> str:
    """Text that lists the available studies, and the progress of those in the store."""
    from ablations.study import Study, load, names
    from ablations.watch import progress_line
    from reports.study_query import load_study, study_names

    there, lines = study_names(store), []
    for name in names():
        _, study = load(name)
        what = f"{', '.join(study.levels)}; {study.seeds} seeds" if isinstance(study, Study) else study.summary()
        lines += [f"{name:<24} {study.question}", f"{'':<24} {what}"]
    lines += ["", f"in {store.uri}:", *([] if there else ["  no study has been started yet"])]
    for name in there:
        data = load_study(store, name)
        lines.append(f"  {name:<22} {progress_line(data)}")
    return "\n".join([*lines, "", "mmphi ablate STUDY runs one; mmphi studies STUDY --watch follows it"])


def study_run_of(store: Any, name: str) -> StudyRun:
    """Study run of a study in the store.

    Raises:
        SettingsError: If the store has no study of that name.
    """
    from ablations.study_run import StudyRun
    from reports.study_query import load_study

    found = StudyRun.find(store, name)
    if found is None:
        load_study(store, name)  # Raises an error that suggests existing names.
        raise AssertionError
    return found


def record_change_of_study(store: Any, name: str, stop: str | None, add: str | None, seeds: int | None) -> None:
    """Record changes to a study; its driver applies them before its next trial.

    Args:
        store: Tracking store.
        name: Name of the study.
        stop: Level that gets no more trials; ``None`` for none.
        add: ``NAME=VALUE`` for a new level, or the name of a stopped level to resume; ``None`` for none.
        seeds: New number of seeds; ``None`` keeps it.

    Raises:
        SettingsError: If the study is a search, a level does not exist or is the baseline, a new level has no value, or
            ``seeds`` is less than 1.
    """
    from ablations.driver import level_value, revise_study
    from ablations.study import Study, check_name

    record = study_run_of(store, name)
    if record.declaration().get("kind") == "search":
        raise SettingsError(
            f"{name} is a search: it has no levels and no seeds to change", "start another search with --name"
        )
    plan = revise_study(Study.declared(record.declaration()), record.changes())
    known = ", ".join(plan.study.levels)
    if stop is not None:
        if stop not in plan.study.levels:
            raise SettingsError(f"there is no level {stop!r}", f"the levels are {known}")
        if stop == plan.study.baseline:
            raise SettingsError(f"{stop} is the baseline, which all levels are compared with", "stop another level")
        record.change("stop", stop)
        print(f"{stop}: no more trials")
    if add is not None:
        level, equals, typed = add.partition("=")
        if not equals and level not in plan.study.levels:
            raise SettingsError(
                f"there is no level {level!r}", f"give it a value: --add '{level}=VALUE'; there are {known}"
            )
        check_name(level)
        value = level_value(plan.study, level, typed) if equals else plan.study.levels[level]
        revised = revise_study(plan.study, [record_change(level, value)]).study
        settings_of_level = revised.settings(level)  # Raises if the value is invalid.
        if level in plan.study.levels and settings_of_level != plan.study.settings(level):
            raise SettingsError(
                f"the level {level!r} is {json.dumps(plan.study.levels[level])} already and has results for it",
                f"give the new value a name of its own: --add '{level} (2)={typed}'",
            )
        record.change("add", level, value)
        print(f"{level}: {json.dumps(value)} continues with the others")
    if seeds is not None:
        if seeds < 1:
            raise SettingsError(f"{seeds} seeds: nothing would be run", "give one at least")
        record.change("seeds", value=seeds)
        print(f"{seeds} seeds")
    print(f"a running driver applies this before its next trial; if none is running: mmphi ablate {name}\n")


def record_change(level: str, value: Any) -> Any:
    """Create a change that adds a level, without recording it."""
    from ablations.study_run import StudyChange

    return StudyChange("add", level, value, "")


def compare(arguments: Sequence[str]) -> int:
    """``mmphi compare STUDY``: open MLflow's pages filtered to the trials of a study, without tuning trials."""
    parser = CommandParser(prog="mmphi compare", description=compare.__doc__)
    parser.add_argument("study", help="its name in the store")
    parser.add_argument("--port", type=int, default=5000, help="of the pages on 127.0.0.1 [5000]")
    parser.add_argument("--no-browser", action="store_true", help="only print the addresses")
    options = parser.parse_args(list(arguments))
    from mmphi.tracking.run_writer import TrackingStore
    from mmphi.tracking.ui import HOST, port_is_open, serve, shared_view
    from reports.ablation import CURVES
    from reports.study_query import load_study

    store = TrackingStore()
    data = load_study(store, options.study, CURVES)
    if not any(trial.finished for trial in data.trials):
        raise SettingsError(f"no trial of {options.study} is finished yet", f"mmphi studies {options.study} --watch")
    server = store.uri.startswith("http")
    metric = data.declaration["metric"]
    first = [metric, former_metric(metric)]  # Earlier runs recorded the former name.
    shared = shared_view(store.uri, data.experiment, first, f"mmphi-{data.name}")
    pages = compare_urls(data, data.address if server else f"http://{HOST}:{options.port}", shared)
    if server or port_is_open(options.port) or options.no_browser:
        print("\n".join(f"{name:<20}{address}" for name, address in pages.items()))
        if not options.no_browser:
            webbrowser.open(next(iter(pages.values())))
        return 0
    return serve(store.uri, options.port, pages, browser=True)


def compare_urls(data: StudyData, base: str, shared: str = "") -> dict[str, str]:
    """URLs of MLflow's pages that show the trials of a study without tuning trials, by page name.

    Args:
        data: The study.
        base: Base URL of the MLflow server.
        shared: URL parameters from :func:`mmphi.tracking.view_state.share`.
    """
    runs = [t.run_id for t in data.trials if t.finished and t.phase != "tuning"][:MOST_COMPARED]
    listed, experiments = quote(json.dumps(runs)), quote(json.dumps([data.experiment]))
    only = quote(f"tags.`mmphi.study` = '{data.name}' AND tags.`mmphi.phase` != 'tuning'")
    runs_url = f"{base}/#/experiments/{data.experiment}/runs?workflowType=machine_learning&searchFilter={only}"
    if shared:
        runs_url += f"&{shared}"
    metric = data.curve or "train/loss"
    curve = f"runs={listed}&metric={quote(json.dumps(metric))}&experiments={experiments}"
    return {
        "charts": f"{runs_url}&compareRunsMode=CHART",
        "table": runs_url,
        "curves": f"{base}/#/metric?{curve}&plot_metric_keys={quote(json.dumps([metric]))}&x_axis=step",
        "side by side": f"{base}/#/compare-runs?runs={listed}&experiments={experiments}",
    }
