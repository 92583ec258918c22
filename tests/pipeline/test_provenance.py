from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from mmphi.pipeline.provenance import installed_packages


def test_a_package_that_is_installed_meanwhile_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    os.utime(tmp_path, (1000, 1000))
    before = installed_packages()
    assert "torch==" not in before
    (tmp_path / "made_up-1.2.dist-info").mkdir()
    (tmp_path / "made_up-1.2.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up\nVersion: 1.2\n")
    assert set(installed_packages().splitlines()) - set(before.splitlines()) == {"made-up==1.2"}


def test_packages_are_read_once_while_nothing_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "torch==" in installed_packages()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # Which nothing else writes to.
    first = installed_packages()
    monkeypatch.setattr("mmphi.pipeline.provenance.distributions", lambda: pytest.fail("was read again"))
    assert installed_packages() == first
