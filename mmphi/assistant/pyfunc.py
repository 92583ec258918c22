"""Loader of ``MLmodel`` files of earlier versions: :mod:`mmphi.serving.pyfunc` under its former name."""

from __future__ import annotations

from mmphi.serving.pyfunc import _load_pyfunc

__all__ = ["_load_pyfunc"]
