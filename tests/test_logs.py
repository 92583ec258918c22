from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from mmphi.logs import LOGGER, ConsoleHandler, show_log


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """The package's logger as it is before any command."""
    before = list(LOGGER.handlers), LOGGER.level, LOGGER.propagate
    LOGGER.handlers, LOGGER.level, LOGGER.propagate = [], logging.NOTSET, True
    yield LOGGER
    LOGGER.handlers, LOGGER.level, LOGGER.propagate = before


def test_information_is_on_standard_output_and_warnings_on_standard_error(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    show_log()
    show_log()  # A second call changes nothing.
    logger.info("scenes: building")
    logger.warning("the disk is nearly full")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("scenes: building\n", "the disk is nearly full\n")


def test_handlers_of_an_application_stay_the_only_ones(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    records: list[logging.LogRecord] = []
    own = logging.Handler()
    own.emit = records.append  # type: ignore[method-assign]  # A handler that only collects.
    logger.addHandler(own)
    show_log()
    assert not any(isinstance(handler, ConsoleHandler) for handler in logger.handlers)
    logger.warning("seen")
    assert [record.getMessage() for record in records] == ["seen"]
    assert capsys.readouterr().out == ""


def test_importing_the_library_installs_no_handler() -> None:
    code = "import logging, mmphi; assert not logging.getLogger('mmphi').handlers; mmphi.load"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
