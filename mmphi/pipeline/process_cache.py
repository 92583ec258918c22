"""Cache of frozen models, features and tokenized data, loaded once per process."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")


class ProcessCache:
    """Weak cache of loaded objects by (kind, digest).

    An object is kept while it is referenced. The most recently requested object of each kind is kept alive for reuse,
    such as by the next trial.
    """

    def __init__(self) -> None:
        self._alive: WeakValueDictionary[tuple[str, str], Any] = WeakValueDictionary()
        self._newest: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.RLock()

    def once(self, kind: str, digest: str, make: Callable[[], T]) -> T:
        """Returns the cached object with a digest, or makes it.

        Args:
            kind: Kind of object, such as ``language`` or ``encoder``.
            digest: Digest of everything that determines the object, including its device.
            make: Function that loads the object.
        """
        with self._lock:
            thing = self._alive.get((kind, digest))
            if thing is None:
                self._newest.pop(kind, None)  # Released first, so that two large models need not fit in memory.
                thing = make()
                self._alive[kind, digest] = thing
            self._newest[kind] = thing
            return thing


PROCESS = ProcessCache()
