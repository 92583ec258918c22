from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

import mmphi
from mmphi.cli import main
from mmphi.errors import MmphiError
from mmphi.pipeline.warning_filters import MESSAGES, install_filters


@pytest.fixture
def unfiltered() -> Iterator[list[logging.Logger]]:
    """The loggers in question, without any filter."""
    loggers = [logging.getLogger(name) for name, _ in MESSAGES]
    before = [logger.filters for logger in loggers]
    for logger in loggers:
        logger.filters = []
    yield loggers
    for logger, filters in zip(loggers, before, strict=True):
        logger.filters = filters


def test_commands_and_loading_a_model_silence_them(
    unfiltered: list[logging.Logger], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["help"]) == 0
    assert all(len(logger.filters) == 1 for logger in unfiltered)
    for logger in unfiltered:
        logger.filters = []
    with pytest.raises(MmphiError):
        mmphi.load(tmp_path)
    assert all(len(logger.filters) == 1 for logger in unfiltered)


def test_what_is_not_true_is_silent_and_everything_else_is_not(caplog: pytest.LogCaptureFixture) -> None:
    install_filters()
    install_filters()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no kernels")
    logger.warning("something else")
    logging.getLogger("transformers.modeling_utils").warning("BertModel LOAD REPORT from: x")
    assert caplog.messages == ["something else"]
    assert len(logger.filters) == 1
