"""Every environment variable of mmphi is declared in one place and documented."""

from __future__ import annotations

import re
from pathlib import Path

from mmphi.config.environment import VARIABLES

ROOT = Path(__file__).resolve().parents[2]
NAME = re.compile(r"\bMMPHI_[A-Z_]+\b")


def test_every_variable_that_the_code_reads_is_declared() -> None:
    files = [path for top in ("mmphi", "ablations", "reports", "experiments") for path in (ROOT / top).rglob("*")]
    found = {
        name
        for path in files
        if path.suffix == ".py" or (path.suffix == ".yaml" and path.parent.name == "experiments")
        for name in NAME.findall(path.read_text())
    }
    assert found == set(VARIABLES)


def test_every_variable_is_documented() -> None:
    page = (ROOT / "docs" / "reference" / "environment.md").read_text()
    assert [name for name, meaning in VARIABLES.items() if f"| `{name}` | {meaning} |" not in page] == []
