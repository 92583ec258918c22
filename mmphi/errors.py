"""Errors meant for people: what is wrong, where, and what to do about it."""

from __future__ import annotations


class MmphiError(Exception):
    """A failure the user can act on; the command line prints it without a traceback.

    Args:
        what: What is wrong and where, in one sentence.
        hint: What to do about it.
    """

    def __init__(self, what: str, hint: str = "") -> None:
        self.what = what
        self.hint = hint
        super().__init__(f"{what}\n  {hint}" if hint else what)


class SettingsError(MmphiError):
    """A setting that is unknown, of the wrong type or impossible."""


class DataError(MmphiError):
    """Input data that cannot be read or is too bad to train on."""


class ImageError(DataError):
    """One image that cannot be used.

    Args:
        reason: Short, countable reason ("missing", "truncated", "too large", ...).
        what: What is wrong and where.
        hint: What to do about it.
    """

    def __init__(self, reason: str, what: str, hint: str = "") -> None:
        super().__init__(what, hint)
        self.reason = reason


class ModelError(MmphiError):
    """A model that cannot be found, loaded or joined to another."""


class StoreError(MmphiError):
    """Results that cannot be found in, or written to, the tracking store."""


class TrainingError(MmphiError):
    """Training that must not go on, such as a loss that is no longer finite."""


class Stopped(KeyboardInterrupt):
    """Asked to stop by a signal; a complete checkpoint was written first, and the same command goes on from it."""
