"""Optional packages, which only some commands need, and the extras of mmphi that install them."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

# Import names of packages that differ from their names on PyPI.
IMPORTED_AS = {"whisper": "openai-whisper", "faster_whisper": "faster-whisper", "markdown_it": "markdown-it-py"}
EXTRA = re.compile(r"extra == ['\"](\w+)['\"]")
INNER = ("dev", "all", "cluster")  # Extras that include other extras.


def extras() -> dict[str, str]:
    """Returns the extra of each optional package, by its name on PyPI in lower case with hyphens."""
    try:
        declared = requires("mmphi") or []
    except PackageNotFoundError:  # Run from a folder without an installation.
        return {}
    found = {}
    for line in declared:
        match = EXTRA.search(line)
        if match and match.group(1) not in INNER:
            name = re.split(r"[\[<>=;! ]", line, maxsplit=1)[0]
            found[name.lower().replace("_", "-")] = match.group(1)
    return found


def missing_package(error: ModuleNotFoundError) -> str:
    """Returns the command that installs a missing module; empty if no extra of mmphi has it."""
    module = (error.name or "").partition(".")[0]
    package = IMPORTED_AS.get(module, module).lower().replace("_", "-")
    extra = extras().get(package)
    return f"pip install '{source()}[{extra}]'" if extra else ""


def source() -> str:
    """Returns what pip can install mmphi from: its checkout if there is one, else its name."""
    root = Path(__file__).resolve().parents[1]
    return str(root) if (root / "pyproject.toml").is_file() else "mmphi"
