"""One script in one process, or in several with the variables that torchrun gives them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from forked import run_ranks

# What every such script begins with: the tests' modules in reach, sums in one order.
HEAD = """
import os, sys
from pathlib import Path
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from builders import Recorder
recorder = Recorder()
"""


def spawn(folder: Path, processes: int, test: str, body: str) -> dict:
    """Run a script and load what its first process saved as ``OUT``.

    Args:
        folder: For scripts and results; the script has a folder ``RUN`` of its own below it.
        processes: How many.
        test: File of the test, whose module the script imports from.
        body: The script; it sets ``saved`` in every process.
    """
    out, script = folder / f"{processes}.pt", folder / f"worker{processes}.py"
    paths = [str(Path(test).parents[1]), str(Path(test).parent)]
    head = HEAD.format(paths=paths) + f"RUN = Path({str(folder / f'run{processes}')!r})\n"
    tail = f'\nif os.environ.get("RANK", "0") == "0":\n    torch.save(saved, {str(out)!r})\n'
    script.write_text(head + body + tail)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for done in run_ranks([str(script)], processes, environment):
        assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)
