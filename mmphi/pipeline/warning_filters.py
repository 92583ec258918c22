"""Filters for individual library warnings that do not apply to mmphi."""

from __future__ import annotations

import logging
import warnings

# Logger, part of the message; the comments give the reason.
MESSAGES = (
    # Recommends a faster 4-bit kernel on CPU, even to users who do not use 4-bit precision.
    ("bitsandbytes.backends.cpu.ops", "gemm_4bit_forward"),
    # Lists the pooler as unused: text towers are loaded without it on purpose.
    ("transformers.modeling_utils", "LOAD REPORT"),
    # The input example is the same for the models of all stages, and covered by tests.
    ("mlflow.pyfunc", "Validating input example"),
)


class WarningFilter(logging.Filter):
    """Suppresses log messages that contain certain words.

    Args:
        words: Text that suppressed messages contain.
    """

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a message is printed."""
        return self.words not in str(record.msg)


def install_filters() -> None:
    """Install the filters for this process; idempotent."""
    for name, words in MESSAGES:
        logger = logging.getLogger(name)
        if not any(isinstance(each, WarningFilter) and each.words == words for each in logger.filters):
            logger.addFilter(WarningFilter(words))
    # Caused inside MLflow by its use of SQLAlchemy.
    warnings.filterwarnings("ignore", message=".*``noload`` loader strategy is deprecated")
    # Caused inside PEFT by its use of transformers.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
