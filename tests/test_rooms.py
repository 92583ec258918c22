"""No import runs upward: cli, stages, (evaluation, training, textgen, models), data, text, settings, errors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    {"errors", "allocator"},
    {"settings"},
    {"text"},
    {"data"},
    {"models"},
    {"cluster"},
    {"textgen"},
    {"training", "evaluation"},
    {"stages"},
    {"assistant", "benchmarks", "describe", "harness"},
    {"cli"},
]
# What stages are given stands beside the floors: it knows what settings and data are, and no model and no stage.
BESIDE = {"pipeline", "tracking"}
MAY_USE = {
    "pipeline": {"errors", "allocator", "settings", "data", "tracking"},
    "tracking": {"errors", "settings", "data", "pipeline"},
}
LIGHT = {"tracking.tracker"}  # A protocol that everybody may name.


def imports(path: Path) -> Iterator[str]:
    """Every module of mmphi that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mmphi."):
            yield node.module.removeprefix("mmphi.")


def floor(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


FILES = [
    p for p in sorted((ROOT / "mmphi").rglob("*.py")) if p.parent != ROOT / "mmphi" or p.stem in ("cli", "describe")
]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT / "mmphi").as_posix())
def test_no_import_runs_upward(path: Path) -> None:
    parts = path.relative_to(ROOT / "mmphi").with_suffix("").parts
    for module in imports(path):
        room = module.partition(".")[0]
        if room == parts[0] or module in LIGHT:
            continue
        if parts[0] in BESIDE:
            lazily = parts[0] == "pipeline" and module == "models.bundle"  # Only where a setting names a model.
            assert room in MAY_USE[parts[0]] or lazily, f"{path.name} imports {module}"
        elif room in BESIDE:
            assert floor(parts[0]) >= floor("stages"), f"{path.name} imports {module}"
        else:
            assert floor(room) <= floor(parts[0]), f"{path.name} imports {module}"


def test_few_files_stand_loose() -> None:
    assert {p.stem for p in (ROOT / "mmphi").glob("*.py")} == {
        "__init__",
        "__main__",
        "allocator",
        "cli",
        "describe",
        "errors",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT / "mmphi").as_posix())
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


def packages(path: Path) -> set[str]:
    """Every package that a file imports from, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
    return found


def test_houses_stand_on_one_another() -> None:
    """Ablations use reports and mmphi, reports use mmphi, mmphi knows neither."""
    for house, unknown in (("mmphi", {"ablations", "reports"}), ("reports", {"ablations"})):
        for path in (ROOT / house).rglob("*.py"):
            assert not packages(path) & unknown, path


@pytest.mark.parametrize("house", ["ablations", "reports"])
def test_their_files_can_be_read_in_one_sitting_too(house: str) -> None:
    for path in (ROOT / house).rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path
