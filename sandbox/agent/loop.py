"""An event loop of descriptors and timers: asyncio's imports would cost megabytes a sandbox."""

from __future__ import annotations

import heapq
import itertools
import os
import selectors
import time
from collections.abc import Callable

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

Callback = Callable[[], object]

_READ_AT_ONCE = 1 << 18


class Timer:
    """A call to come; `cancel` prevents it."""

    def __init__(self, callback: Callback) -> None:
        """Wraps the call."""
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        """Prevents the call, if it has not happened."""
        self.callback = None


class Loop:
    """Calls back when descriptors are ready and when time has passed."""

    def __init__(self) -> None:
        """Makes a loop that watches nothing."""
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()

    def watch(self, fd: int, callback: Callback, events: int = READ) -> None:
        """Calls back whenever a descriptor is ready; replaces an earlier watch of it."""
        if fd in self._selector.get_map():
            self._selector.modify(fd, events, callback)
        else:
            self._selector.register(fd, events, callback)

    def unwatch(self, fd: int) -> None:
        """Forgets a descriptor, watched or not; call before closing it."""
        if fd in self._selector.get_map():
            self._selector.unregister(fd)

    def later(self, seconds: float, callback: Callback) -> Timer:
        """Calls back once."""
        timer = Timer(callback)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), timer))
        return timer

    def run(self) -> None:
        """Serves for ever."""
        while True:
            for key, _ in self._selector.select(self._pause()):
                # A callback before may have forgotten this descriptor.
                if self._selector.get_map().get(key.fd) is key:
                    key.data()
            while self._timers and self._timers[0][0] <= time.monotonic():
                callback = heapq.heappop(self._timers)[2].callback
                if callback is not None:
                    callback()

    def _pause(self) -> float | None:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None


def read_some(fd: int) -> bytes | None:
    """What a descriptor that does not block has; empty at its end, None when nothing yet."""
    try:
        return os.read(fd, _READ_AT_ONCE)
    except BlockingIOError:
        return None
