"""Things that took work, kept as long as there is room: the least recently used go first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class Kept(Generic[V]):
    """Values by keys, no more of them than fit.

    Args:
        room: what all weigh together at most.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()
        self.weight = 0

    def get(self, key: Hashable) -> V | None:
        with self._lock:
            found = self._values.get(key)
            if found is None:
                return None
            self._values.move_to_end(key)
            return found[0]

    def put(self, key: Hashable, value: V, weight: int = 1) -> None:
        """Keep a value; one that is heavier than all the room is not kept."""
        with self._lock:
            self.weight -= self._values.pop(key, (None, 0))[1]
            if weight > self._room:
                return
            self._values[key] = value, weight
            self.weight += weight
            while self.weight > self._room:
                _, (_, old) = self._values.popitem(last=False)
                self.weight -= old
