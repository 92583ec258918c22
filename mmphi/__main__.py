"""Entry point of ``python -m mmphi``, which MLproject's entry points run."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

if any(find_spec(package) is None for package in ("mlflow", "pydantic", "torch")):
    # `.venv/bin/mlflow run` does not change PATH, and the Python found there may lack the packages.
    made = Path(__file__).resolve().parents[1] / ".venv" / "bin" / "python"
    if not made.exists() or Path(sys.executable) == made:
        sys.exit(
            f"error: {sys.executable} lacks mmphi's packages\n  run make, or activate the environment that has them"
        )
    os.execv(made, [str(made), "-m", "mmphi", *sys.argv[1:]])

from mmphi.cli import main

sys.exit(main())
