"""The version is in ``pyproject.toml`` and nowhere else."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

import pytest

import mmphi

ROOT = Path(__file__).resolve().parents[1]
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def not_installed(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def test_the_version_is_that_of_the_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mmphi.__version__ == mmphi._version() == DECLARED
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"7.8.9 of {name}")
    assert mmphi._version() == "7.8.9 of mmphi"


def test_a_checkout_that_is_not_installed_reads_its_own_project_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    assert mmphi._version() == DECLARED
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "7.8.9"\n')
    monkeypatch.setattr(mmphi, "__file__", str(tmp_path / "mmphi" / "__init__.py"))
    assert mmphi._version() == "7.8.9"
    (tmp_path / "pyproject.toml").unlink()
    assert mmphi._version() == "unknown"


def test_no_other_file_holds_the_version() -> None:
    """The number would be forgotten there when it is raised."""
    assert f'"{DECLARED}"' not in (ROOT / "mmphi" / "__init__.py").read_text()
    assert "\nversion:" not in (ROOT / "CITATION.cff").read_text()
