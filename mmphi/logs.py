"""The package's logger, and how commands show what it logs.

The library logs to ``logging.getLogger("mmphi")`` and installs no handler. Commands and pipelines install
:class:`ConsoleHandler`, unless the logger has a handler already.
"""

from __future__ import annotations

import logging
import sys

LOGGER = logging.getLogger("mmphi")


class ConsoleHandler(logging.Handler):
    """Writes information to standard output and warnings to standard error, without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record as a line without decoration."""
        try:
            from tqdm import tqdm

            stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
            tqdm.write(self.format(record), file=stream)
            stream.flush()
        except (OSError, ValueError):  # The stream is closed, as in `mmphi ... | head`.
            self.handleError(record)


def show_log() -> None:
    """Show what the package logs on the console; a logger that already has handlers is not changed."""
    if LOGGER.handlers:
        return
    LOGGER.addHandler(ConsoleHandler())
    LOGGER.propagate = False
    if LOGGER.level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)
