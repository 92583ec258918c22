"""Thread-safe LRU cache."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

from cachetools import LRUCache

V = TypeVar("V")


class LockedLRUCache(Generic[V]):
    """Thread-safe cache by key that evicts the least recently used values first.

    Args:
        size: Maximum total size of the values.
        size_of: Returns the size of a value; by default 1.
    """

    def __init__(self, size: float, size_of: Callable[[V], float] = lambda _: 1) -> None:
        self._values: LRUCache[str, V] = LRUCache(size, size_of)
        self._lock = threading.Lock()

    def get(self, key: str) -> V | None:
        """Returns the value of a key, or ``None`` if it is not cached."""
        with self._lock:
            found: V | None = self._values.get(key)
            return found

    def put(self, key: str, value: V) -> None:
        """Store a value, unless it is larger than the cache."""
        with self._lock, suppress(ValueError):
            self._values[key] = value
