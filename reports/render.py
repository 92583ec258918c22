"""Renders a report to files: markdown with figures, a csv per table, and one self-contained HTML page."""

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
    """Escape untrusted text to one line of markdown that renders verbatim."""
    return MARKUP.sub(r"\\\1", " ".join(text.split()))


@dataclass(frozen=True)
class ReportTable:
    """A table.

    Attributes:
        columns: Names of the columns.
        rows: Values; links as ``[text](address)``.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def markdown(self) -> str:
        """The table as markdown; pipes are escaped and line breaks become spaces."""
        head = [self._line(self.columns), self._line(["---"] * len(self.columns))]
        return "\n".join([*head, *(self._line(row) for row in self.rows)])

    @staticmethod
    def _line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    def csv(self) -> bytes:
        """The table as csv."""
        content = io.StringIO()
        pd.DataFrame(list(self.rows), columns=list(self.columns)).to_csv(content, index=False, lineterminator="\n")
        return content.getvalue().encode()


@dataclass
class ReportDocument:
    """A report.

    Attributes:
        template: File name of the template in ``templates/``.
        title: Title of the page.
        values: Variables of the template.
        tables: Tables by name; each is also written as csv.
        figures: PNG files by name.
    """

    template: str
    title: str
    values: Mapping[str, Any]
    tables: dict[str, ReportTable] = field(default_factory=dict)
    figures: dict[str, bytes] = field(default_factory=dict)

    def markdown(self) -> str:
        """The report as markdown, which refers to its figures as separate files."""
        text = (
            environment()
            .get_template(self.template)
            .render(**self.values, tables=self.tables, figures=self.figures, title=self.title)
        )
        return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"

    def page(self) -> str:
        """The report as one self-contained HTML page."""
        # Samples, names of levels and messages may contain HTML, which must be shown as text.
        body = MarkdownIt("commonmark", {"html": False}).enable("table").render(self.markdown())

        def held(match: re.Match[str]) -> str:
            content = self.figures[match.group(1).removesuffix(".png")]
            return f'<img src="data:image/png;base64,{base64.b64encode(content).decode()}"'

        page = environment().get_template("page.html.j2")
        return page.render(title=html.escape(self.title), body=IMAGE.sub(held, body)) + "\n"

    def files(self) -> dict[str, bytes]:
        """Contents of all files of the report by name; equal reports give equal bytes."""
        return {
            "report.md": self.markdown().encode(),
            "report.html": self.page().encode(),
            **{f"{name}.png": content for name, content in self.figures.items()},
            **{f"{name}.csv": table.csv() for name, table in self.tables.items()},
        }


@cache
def environment() -> jinja2.Environment:
    """Jinja environment of the templates; undefined variables raise an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # The templates are markdown; markdown-it escapes HTML for the page.
    )
