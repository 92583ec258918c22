"""Suppression of transformers' progress bar for weights that are read from a local folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging as transformers_logging


@contextmanager
def no_loading_bar(path: str) -> Iterator[None]:
    """Hide the progress bar while weights are read from a local folder; downloads keep it.

    Args:
        path: Folder or hub name of the model.
    """
    if not Path(path).exists() or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
