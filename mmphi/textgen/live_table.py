"""Progress of generators: a live table in a terminal, and a line every 30 s elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

LINE_S = 30.0


class LiveTable:
    """Shows the progress of each generator, and a line of totals.

    Args:
        rows: Returns the generators' rows, such as :meth:`mmphi.textgen.generator_pool.GeneratorPool.rows`.
        below: Returns the text below the table.
        console: Console to draw on; by default on stderr.
    """

    def __init__(
        self,
        rows: Callable[[], Sequence[Mapping[str, Any]]],
        below: Callable[[], str],
        console: Console | None = None,
    ) -> None:
        self.rows, self.below = rows, below
        self.console = console or Console(stderr=True)
        self._live: Live | None = None
        self._printed_at = time.monotonic()

    def __enter__(self) -> LiveTable:
        if self.console.is_terminal:
            self._live = Live(self._drawn(), console=self.console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        self.console.print(self._drawn())

    def show(self) -> None:
        """Update the table; outside a terminal, print a line if the last one is older than 30 s."""
        if self._live is not None:
            self._live.update(self._drawn())
        elif time.monotonic() - self._printed_at > LINE_S:
            self._printed_at = time.monotonic()
            rows = self.rows()
            tokens, rate = sum(r["tokens"] for r in rows), sum(r["tokens/s"] for r in rows)
            self.console.print(f"{tokens:,} tokens written, {rate:.0f}/s; {self.below()}", highlight=False)

    def _drawn(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for number, name in enumerate(HEAD):
            table.add_column(name, justify="right" if number else "left")
        for row in self.rows():
            table.add_row(
                str(row["generator"]),
                f"{row['documents']:,}",
                f"{row['documents/s']:.2f}",
                f"{row['tokens']:,}",
                f"{row['tokens/s']:.1f}",
                f"{row['busy']:.0%}",
                f"{row['waited s']:.0f}",
                str(row["starts"]),
                str(row["dropped"]),
            )
        return Group(table, Text(self.below()))


HEAD = ("generator", "documents", "per s", "tokens", "per s", "busy", "waited, s", "starts", "no text")
