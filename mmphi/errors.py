"""Errors with a message for users: what is wrong, where, and what to do about it."""

from __future__ import annotations

import errno

FULL = ("No space left on device", "database or disk is full", "PytorchStreamWriter failed writing file")


class MmphiError(Exception):
    """An error that the user can fix; the command line prints it without a traceback.

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


class AudioError(DataError):
    """One recording that cannot be used.

    Args:
        reason: Short, countable reason ("not audio", "too long", ...).
        what: What is wrong and where.
        hint: What to do about it.
    """

    def __init__(self, reason: str, what: str, hint: str = "") -> None:
        super().__init__(what, hint)
        self.reason = reason


class ModelError(MmphiError):
    """A model that cannot be found, loaded or joined with another."""


class PartMissingError(ModelError):
    """A part of a model that this machine does not have, such as Whisper; no request can change that."""


class GenerationError(MmphiError):
    """An answer that failed because of the model, and not because of the request."""


class StoreError(MmphiError):
    """Results that cannot be found in, or written to, the tracking store."""


class TrainingError(MmphiError):
    """Training that must not continue, for example because the loss is not finite."""


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is that of a full disk, whichever library raised it.

    SQLite has its own message, and torch reports only that it could not write a file.
    """
    while error is not None:
        text = str(error)
        if getattr(error, "errno", None) == errno.ENOSPC or any(words in text for words in FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


class Stopped(KeyboardInterrupt):
    """A stop requested by a signal; a training with a checkpoint folder first saves a checkpoint, to resume from."""
