"""What was used most recently, up to a size, for several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

from cachetools import LRUCache

V = TypeVar("V")


class LockedLRUCache(Generic[V]):
    """Values by key, of which the least recently used ones go first.

    Args:
        size: Of all together.
        size_of: Of one; each counts 1 where left out.
    """

    def __init__(self, size: float, size_of: Callable[[V], float] = lambda _: 1) -> None:
        self._values: LRUCache[str, V] = LRUCache(size, size_of)
        self._lock = threading.Lock()

    def get(self, key: str) -> V | None:
        """The value of a key, if it is still there."""
        with self._lock:
            found: V | None = self._values.get(key)
            return found

    def put(self, key: str, value: V) -> None:
        """Keep a value, unless it alone is larger than all may be."""
        with self._lock, suppress(ValueError):
            self._values[key] = value
