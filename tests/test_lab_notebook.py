"""The lab notebook: one page per topic, of which both tables give the lesson."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAB = ROOT / "docs" / "lab"
PAGES = sorted(path for path in LAB.glob("*.md") if path.name != "index.md")


def lesson(page: Path) -> str:
    """The sentence after ``Lesson:``, on one line and with a capital letter, as the tables have it."""
    found = re.search(r"^Lesson: (.+?)\n\n", page.read_text(), re.DOTALL | re.MULTILINE)
    assert found, f"{page.name} has no line that begins with Lesson:"
    words = " ".join(found[1].split())
    return words[0].upper() + words[1:]


def rows(table: Path, cell: int) -> dict[str, str]:
    """Last cell of each row of a table of pages, by the page that the link in the given cell names."""
    lines = [line.strip("| ").split(" | ") for line in table.read_text().splitlines() if ".md)" in line and "|" in line]
    return {Path(re.findall(r"\]\((.+?)\)", line[cell])[-1]).name: line[-1] for line in lines}


def test_both_tables_list_every_page_with_its_lesson() -> None:
    lessons = {page.name: lesson(page) for page in PAGES}
    assert len(lessons) > 1
    assert rows(LAB / "index.md", 0) == lessons
    assert rows(ROOT / "experiments" / "LOG.md", 1) == lessons


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_links_of_the_notebook_lead_to_files_and_headings() -> None:
    broken = []
    for page in [*LAB.glob("*.md"), ROOT / "experiments" / "LOG.md"]:
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            if not target.exists() or (anchor and anchor not in headings(target)):
                broken.append(f"{page.name}: {link}")
    assert broken == []
