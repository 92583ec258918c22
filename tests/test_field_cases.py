"""Inputs from the field, in the folder that MMPHI_CASES names: each is handled as is expected."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from field_cases import SETS

pytestmark = pytest.mark.real
COUNTS = {"clients": 41, "sound": 13, "rows": 7, "pictures": 16, "corpora": 8}  # So that none is left out unnoticed.


@pytest.mark.parametrize("kind", SETS, ids=lambda kind: kind.__name__)
def test_every_case_is_as_expected(kind, monkeypatch):
    folder = os.environ.get("MMPHI_CASES")
    if not folder:
        pytest.skip("MMPHI_CASES is not set")
    monkeypatch.syspath_prepend(Path(__file__).parent / "serving")
    outcomes = list(kind(Path(folder)))
    assert len(outcomes) == COUNTS[kind.__name__]
    assert [outcome for outcome in outcomes if not outcome.right] == []
