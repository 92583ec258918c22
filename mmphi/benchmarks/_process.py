"""Parts of a benchmark in separate processes, so that the peak memory of each is measured separately."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def in_process(label: str, name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a part of a benchmark in a separate process; returns the JSON object in the last line of its output.

    Args:
        label: Name of the part in the error message.
        name: Name of the benchmark after ``mmphi benchmark``.
        arguments: Arguments that select the part.

    Raises:
        RuntimeError: If the process fails.
    """
    command = [sys.executable, "-m", "mmphi", "benchmark", name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{label}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))
