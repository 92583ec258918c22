"""Frozen models, features and encoded data, held once a process whoever asks for them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")


class ProcessCache:
    """What a process has loaded, by kind and digest.

    A thing lives as long as anybody uses it; the one of each kind that was asked for last lives on, for the next trial.
    """

    def __init__(self) -> None:
        self._alive: WeakValueDictionary[tuple[str, str], Any] = WeakValueDictionary()
        self._newest: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.RLock()

    def once(self, kind: str, digest: str, make: Callable[[], T]) -> T:
        """The thing with a digest: the one this process has, else made now.

        Args:
            kind: ``language``, ``encoder``, ...
            digest: Of everything that decides what the thing is, its device included.
            make: Loads it.
        """
        with self._lock:
            thing = self._alive.get((kind, digest))
            if thing is None:
                self._newest.pop(kind, None)  # Two large models need not fit in memory at once.
                thing = make()
                self._alive[kind, digest] = thing
            self._newest[kind] = thing
            return thing


PROCESS = ProcessCache()
