"""Provenance of a result: settings, data, upstream results, code, machine and packages."""

from __future__ import annotations

import functools
import getpass
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import yaml

from mmphi.config.declared_view import SettingsView, covered
from mmphi.config.fields import leaves
from mmphi.config.section import Section
from mmphi.pipeline.stage import Result, Stage

if TYPE_CHECKING:
    from mmphi.tracking.run_tracker import RunTracker

ROOT = Path(__file__).resolve().parents[2]
DIFF_CHARACTERS = 2_000_000


def record_provenance(
    tracker: RunTracker, stage: Stage, settings: Section, parts: Mapping[str, Any], needed: Mapping[str, Result]
) -> None:
    """Record the provenance of a result in its run.

    Args:
        tracker: Tracker of the run.
        stage: The stage that the run builds.
        settings: All settings, resolved.
        parts: Parts of the result's key.
        needed: Upstream results by stage name.
    """
    resolved = settings.model_dump()
    tracker.text("settings.yaml", yaml.safe_dump(resolved, sort_keys=False))
    tracker.text("key.json", json.dumps(parts, indent=1))
    from mmphi.tracking.datasets import datasets_of, log_datasets

    # `mlflow run` has logged parameters such as `seed`; setting names contain a dot, so they do not collide.
    unused = stage.unused(SettingsView(settings, stage.declared))
    read = ((name, value) for name, value in leaves(settings) if covered(name, stage.reads))
    tracker.params({name: value for name, value in read if not covered(name, unused)})
    context = "evaluation" if stage.name == "evaluate" else "training"
    log_datasets(tracker.client, tracker.run_id, datasets_of(parts, dict(leaves(settings)), needed), context)
    data = {f"mmphi.data.{n}": v for n, v in parts.items() if str(v).startswith("sha256:")}
    upstream = {f"mmphi.upstream.{name}": result.run_id for name, result in needed.items()}
    tags, diff = code_tags()
    tracker.tags({**data, **upstream, **tags, **hardware_tags(), "mmphi.version": str(stage.version)})
    tracker.tags({"mlflow.note.content": _note(tracker, stage, needed), "mlflow.user": _user()})
    tracker.text("packages.txt", installed_packages())
    if diff:
        tracker.text("uncommitted.diff", diff)


def _note(tracker: RunTracker, stage: Stage, needed: Mapping[str, Result]) -> str:
    """Description of the run on MLflow's page, with links to upstream runs."""
    links = []
    for name, result in needed.items():
        experiment = tracker.client.get_run(result.run_id).info.experiment_id
        links.append(f"[{name}](#/experiments/{experiment}/runs/{result.run_id})")
    return f"{stage.help}. Built on {', '.join(links)}." if links else f"{stage.help}."


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # In a container, the user ID may have no name.
        return "unknown"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, errors="replace")
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def code_tags() -> tuple[dict[str, str], str]:
    """Returns tags with the git commit, and the diff of uncommitted changes (empty if there are none)."""
    git = ("git", "-C", str(ROOT))
    # An installed copy may be inside another project's repository.
    if not (ROOT / ".git").exists():
        return {"mmphi.git_commit": "unknown", "mmphi.git_dirty": "unknown"}, ""
    commit, status = _output(*git, "rev-parse", "HEAD"), _output(*git, "status", "--porcelain")
    tags = {"mmphi.git_commit": commit or "unknown", "mmphi.git_dirty": str(bool(status)).lower()}
    if commit:
        tags["mlflow.source.git.commit"] = commit
    diff = f"{status}\n\n{_output(*git, 'diff', 'HEAD')}"[:DIFF_CHARACTERS] if status else ""
    return tags, diff


def hardware_tags() -> dict[str, str]:
    """Returns tags that describe the machine: CPU, cores, memory in GB, and GPUs."""
    tags = {
        "mmphi.cpu": _cpu_name(),
        "mmphi.cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "mmphi.memory_gb": f"{psutil.virtual_memory().total / 1e9:.0f}",
    }
    # torch would initialise CUDA in this process, and forked workers could not use it afterwards.
    query = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    cards = _output(*query).splitlines() if shutil.which("nvidia-smi") else []
    return {**tags, "mmphi.gpu": "; ".join(cards)} if cards else tags


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def installed_packages() -> str:
    """Returns the installed packages, one ``name==version`` per line."""
    folders = [Path(folder) for folder in sys.path if Path(folder).is_dir()]
    return _packages(tuple((str(folder), folder.stat().st_mtime_ns) for folder in folders))


@functools.lru_cache(maxsize=1)
def _packages(_: tuple[tuple[str, int], ...]) -> str:
    """Reread only if a package folder has changed: 200 packages take half a second."""
    versions = {f"{d.metadata['Name']}=={d.version}" for d in distributions() if d.metadata["Name"]}
    return "\n".join([f"python=={platform.python_version()}", *sorted(versions, key=str.lower)]) + "\n"
