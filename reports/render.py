"""A report as files: markdown with figures, csv of every table, one HTML page that holds all."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markdown_it import MarkdownIt

TEMPLATES = Path(__file__).parent / "templates"
MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~!&])")
IMAGE = re.compile(r'<img src="([^"]+\.png)"')


def plain(text: str) -> str:
    """Text that a model or a file wrote, as one line of markdown that shows it as it is."""
    return MARKUP.sub(r"\\\1", " ".join(text.split()))


@dataclass(frozen=True)
class ReportTable:
    """Rows under columns.

    Attributes:
        columns: Their names.
        rows: Values, written as they are; links as ``[text](address)``.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def markdown(self) -> str:
        """As a table of markdown; what would end a cell is escaped."""
        head = [self._line(self.columns), self._line(["---"] * len(self.columns))]
        return "\n".join([*head, *(self._line(row) for row in self.rows)])

    @staticmethod
    def _line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    def csv(self) -> bytes:
        """As csv."""
        content = io.StringIO()
        pd.DataFrame(list(self.rows), columns=list(self.columns)).to_csv(content, index=False, lineterminator="\n")
        return content.getvalue().encode()


@dataclass
class ReportDocument:
    """A report.

    Attributes:
        template: Name of its file in ``templates/``.
        title: Of the page.
        values: What the template is filled with.
        tables: By name; each also a csv.
        figures: PNG by name.
    """

    template: str
    title: str
    values: Mapping[str, Any]
    tables: dict[str, ReportTable] = field(default_factory=dict)
    figures: dict[str, bytes] = field(default_factory=dict)

    def markdown(self) -> str:
        """The report as markdown, its figures beside it."""
        text = (
            environment()
            .get_template(self.template)
            .render(**self.values, tables=self.tables, figures=self.figures, title=self.title)
        )
        return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"

    def page(self) -> str:
        """The report as one page of HTML that needs no other file."""
        # Samples, names of levels and messages may hold HTML, which is text here.
        body = MarkdownIt("commonmark", {"html": False}).enable("table").render(self.markdown())

        def held(match: re.Match[str]) -> str:
            content = self.figures[match.group(1).removesuffix(".png")]
            return f'<img src="data:image/png;base64,{base64.b64encode(content).decode()}"'

        page = environment().get_template("page.html.j2")
        return page.render(title=html.escape(self.title), body=IMAGE.sub(held, body)) + "\n"

    def files(self) -> dict[str, bytes]:
        """All files of the report, by name; the same report gives the same bytes."""
        return {
            "report.md": self.markdown().encode(),
            "report.html": self.page().encode(),
            **{f"{name}.png": content for name, content in self.figures.items()},
            **{f"{name}.csv": table.csv() for name, table in self.tables.items()},
        }


@cache
def environment() -> jinja2.Environment:
    """The templates; a name that is not there is an error, not nothing."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown is no HTML; the page takes what markdown-it has escaped.
    )
