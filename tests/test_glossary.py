"""Every file and class that the glossary names exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_files_and_classes_of_the_glossary_exist() -> None:
    text = (ROOT / "docs" / "explanation" / "glossary.md").read_text()
    code = "\n".join(
        path.read_text() for top in ("mmphi", "ablations", "reports") for path in (ROOT / top).rglob("*.py")
    )
    files = re.findall(r"`([\w/]+\.py)`", text)
    assert len(files) > 40
    assert [f for f in files if not any((ROOT / top / f).is_file() for top in ("mmphi", "."))] == []
    classes = re.findall(r"`([A-Z]\w+)`", text)
    assert len(classes) > 40
    assert [name for name in classes if not re.search(rf"\b(class|def) {name}\b", code)] == []
