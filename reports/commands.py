"""``mmphi report KIND``: writes a report from the tracking store to a folder and to MLflow."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmphi.config.arguments import CommandParser
from mmphi.errors import SettingsError

if TYPE_CHECKING:
    from mmphi.tracking.run_store import RunStore
    from reports.render import ReportDocument

KINDS = ("ablation", "pretraining", "benchmarks")
AS_PRESET = "preset"  # Default of MLproject's parameters, the same as an empty value.


@dataclass(frozen=True)
class WrittenReport:
    """A report to write.

    Attributes:
        document: The report.
        name: Name of its folder.
        about: Address of each MLflow run that the report is stored with, by run id.
    """

    document: ReportDocument
    name: str
    about: Mapping[str, str]


def report(arguments: Sequence[str]) -> int:
    """``mmphi report``."""
    parser = CommandParser(
        prog="mmphi report", description="Write a report from the tracking store alone; no model is loaded."
    )
    parser.add_argument("kind", nargs="?", default="ablation", choices=KINDS, help="what it is about [ablation]")
    parser.add_argument("--study", default="", help="ablation: the study; `mmphi studies` lists them")
    parser.add_argument(
        "--runs", default="", help="pretraining: ids of runs, separated by commas, or all [the newest that finished]"
    )
    parser.add_argument("--out", default="", help="folder to write to [reports/out/NAME]")
    parser.add_argument("--no-log", action="store_true", help="write the files only; leave MLflow as it is")
    options = parser.parse_args(list(arguments))
    given = {name: "" if getattr(options, name) == AS_PRESET else getattr(options, name) for name in ("study", "runs")}
    from mmphi.tracking.run_store import RunStore

    store = RunStore()
    mlflow_run_id = os.environ.get("MLFLOW_RUN_ID", "")  # Set by `mlflow run`.
    if mlflow_run_id:
        store.record_in_experiment_of(mlflow_run_id, f"report {given['study'] or options.kind}")
    if options.kind == "ablation":
        made = _ablation(store, given["study"])
    else:
        made = _pretraining(store, given["runs"]) if options.kind == "pretraining" else _benchmarks(store)
    folder = Path("reports") / "out" / made.name if options.out in ("", AS_PRESET) else Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    files = made.document.files()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if not options.no_log:
        for name in files:
            for run_id in filter(None, (*made.about, mlflow_run_id)):
                store.client.log_artifact(run_id, str(folder / name), "report")
    values = made.document.values
    print(str(values.get("headline") or values["best"]).replace("**", ""))
    print(f"\n{folder / 'report.md'}\n{folder / 'report.html'}")
    if not options.no_log:
        for address in made.about.values():
            print(f"{address}/artifacts")
    return 0


def _ablation(store: RunStore, study: str) -> WrittenReport:
    from reports.ablation import CURVES, ablation_report
    from reports.search import search_report
    from reports.study_query import load_study, study_names

    if not study:
        there = ", ".join(study_names(store)) or "none yet"
        raise SettingsError("which study is the report about?", f"--study NAME; the store has: {there}")
    data = load_study(store, study, CURVES)
    document = search_report(data) if data.declaration.get("kind") == "search" else ablation_report(data)
    return WrittenReport(document, study, {data.run_id: data.link(data.run_id)})


def _pretraining(store: RunStore, chosen: str) -> WrittenReport:
    from reports.pretraining import pretraining_report
    from reports.pretraining_query import load_pretrainings
    from reports.references import reference_of

    runs = load_pretrainings(store, [name.strip() for name in chosen.split(",") if name.strip()])
    # The report is stored with the run that its headline is about.
    return WrittenReport(pretraining_report(runs, reference_of()), "pretraining", {runs[0].run_id: runs[0].link})


def _benchmarks(store: RunStore) -> WrittenReport:
    from reports.benchmarks import benchmarks, load_benchmarked, published

    runs = load_benchmarked(store)
    return WrittenReport(benchmarks(runs, published()), "benchmarks", {runs[0].run_id: runs[0].link})
