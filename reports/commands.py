"""``mmphi report KIND``: a report from the store, into a folder and into MLflow."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

KINDS = ("ablation",)
AS_PRESET = Path("preset")  # What MLproject's parameters say where nothing is said.


def report(arguments: Sequence[str]) -> int:
    """``mmphi report``."""
    parser = argparse.ArgumentParser(
        prog="mmphi report", description="Write a report from the tracking store alone; no model is loaded."
    )
    parser.add_argument("kind", nargs="?", default="ablation", choices=KINDS, help="what it is about [ablation]")
    parser.add_argument("--study", required=True, help="name of the study in the store: `mmphi studies` lists them")
    parser.add_argument("--out", type=Path, help="folder to write to [reports/out/STUDY]")
    parser.add_argument("--no-log", action="store_true", help="write the files only; leave MLflow as it is")
    options = parser.parse_args(list(arguments))
    from mmphi.tracking.search import RunStore
    from reports.ablation import CURVE, ablation
    from reports.query import load_study
    from reports.search import search

    store = RunStore()
    begun = os.environ.get("MLFLOW_RUN_ID", "")  # Set by `mlflow run`.
    if begun:
        store.record_beside(begun, f"report {options.study}")
    data = load_study(store, options.study, CURVE)
    document = search(data) if data.declaration.get("kind") == "search" else ablation(data)
    folder = Path("reports") / "out" / options.study if options.out in (None, AS_PRESET) else options.out
    folder.mkdir(parents=True, exist_ok=True)
    files = document.files()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if not options.no_log:
        for name in files:
            for run_id in filter(None, (data.run_id, begun)):
                store.client.log_artifact(run_id, str(folder / name), "report")
    print(str(document.values.get("headline") or document.values["best"]).replace("**", ""))
    print(f"\n{folder / 'report.md'}\n{folder / 'report.html'}")
    if not options.no_log:
        print(f"{data.link(data.run_id)}/artifacts")
    return 0
