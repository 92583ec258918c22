"""Where a result came from: code, machine, packages."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from importlib.metadata import distributions
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def code() -> tuple[dict[str, str], str]:
    """Tags that name the commit, and the diff of what is not committed."""
    commit, status = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    tags = {"mmphi.git_commit": commit or "unknown", "mmphi.git_dirty": str(bool(status)).lower()}
    return tags, _git("diff", "HEAD") if status else ""


def hardware() -> dict[str, str]:
    """Tags that describe the machine."""
    tags = {
        "mmphi.cpu": _cpu_name(),
        "mmphi.cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "mmphi.memory_gb": f"{psutil.virtual_memory().total / 1e9:.0f}",
        "mmphi.host": socket.gethostname(),
        "mmphi.pid": str(os.getpid()),
    }
    import torch

    if torch.cuda.is_available():
        tags["mmphi.gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return tags


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def packages() -> str:
    """Installed packages, one ``name==version`` a line."""
    found = {f"{d.metadata['Name']}=={d.version}" for d in distributions() if d.metadata["Name"]}
    return "\n".join([f"python=={platform.python_version()}", *sorted(found, key=str.lower)]) + "\n"
