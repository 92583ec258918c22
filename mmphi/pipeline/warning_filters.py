"""Warnings of libraries that are not true for whoever reads them here, silenced one by one and nothing else."""

from __future__ import annotations

import logging
import warnings

# Logger, words of its message, and why it is not true.
MESSAGES = (
    # Only 4-bit arithmetic on a CPU would be faster with it; whoever does not ask for that is told for nothing.
    ("bitsandbytes.backends.cpu.ops", "gemm_4bit_forward"),
    # A text tower is loaded without its pooler on purpose: what the report lists as left over is just that.
    ("transformers.modeling_utils", "LOAD REPORT"),
    # What a stage's model is given as an example is the same for all of them, and tested.
    ("mlflow.pyfunc", "Validating input example"),
)


class WarningFilter(logging.Filter):
    """Lets every message pass but those with certain words."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a message is printed."""
        return self.words not in str(record.msg)


def install_filters() -> None:
    """Silence them for this process; calling it again changes nothing."""
    for name, words in MESSAGES:
        logger = logging.getLogger(name)
        if not any(isinstance(each, WarningFilter) and each.words == words for each in logger.filters):
            logger.addFilter(WarningFilter(words))
    # MLflow's own use of SQLAlchemy, which nobody here can change.
    warnings.filterwarnings("ignore", message=".*``noload`` loader strategy is deprecated")
    # PEFT's own use of transformers, likewise.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
