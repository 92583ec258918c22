from __future__ import annotations

import logging

import pytest

from mmphi.pipeline.quiet import quieten


def test_what_is_not_true_is_silent_and_everything_else_is_not(caplog: pytest.LogCaptureFixture) -> None:
    quieten()
    quieten()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no kernels")
    logger.warning("something else")
    logging.getLogger("transformers.modeling_utils").warning("BertModel LOAD REPORT from: x")
    assert caplog.messages == ["something else"]
    assert len(logger.filters) == 1
