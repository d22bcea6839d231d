"""An event loop of descriptors and timers: asyncio's imports would cost megabytes a sandbox."""

from __future__ import annotations

import heapq
import itertools
import os
import selectors
import time
from collections.abc import Callable
from contextlib import suppress

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

Callback = Callable[[], object]

_READ_AT_ONCE = 1 << 18
_MAX_PAUSE_S = 86_400.0


class Timer:
    """A call to come; `cancel` prevents it."""

    def __init__(self, callback: Callback, frozen: float | None) -> None:
        """Wraps the call, and the seconds for which the agent had been frozen before."""
        self.callback: Callback | None = callback
        self.frozen = frozen

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
        self._frozen_path = ""
        self._frozen_fd: int | None = None

    def heed(self, path: str) -> None:
        """From now on what is spent frozen, as a file of the service tells it, is no time."""
        self._frozen_path = path

    def _frozen(self) -> float:
        if self._frozen_fd is None:
            # The service may be slower to make it than the agent to start; some make none.
            with suppress(FileNotFoundError):
                self._frozen_fd = os.open(self._frozen_path, os.O_RDONLY | os.O_CLOEXEC)
        return 0.0 if self._frozen_fd is None else float(os.pread(self._frozen_fd, 64, 0) or 0)

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

    def later(self, seconds: float, callback: Callback, *, even_frozen: bool = False) -> Timer:
        """Calls back once; the time runs on while the agent is frozen only if `even_frozen`."""
        timer = Timer(callback, None if even_frozen else self._frozen())
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
                self._fire(*heapq.heappop(self._timers))

    def _fire(self, due: float, order: int, timer: Timer) -> None:
        if timer.callback is None:
            return
        if timer.frozen is not None and (frozen := self._frozen()) > timer.frozen:
            due, timer.frozen = due + frozen - timer.frozen, frozen
            heapq.heappush(self._timers, (due, order, timer))
            return
        timer.callback()

    def _pause(self) -> float | None:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        # The kernel refuses to wait for more than 24 days.
        left_s = self._timers[0][0] - time.monotonic() if self._timers else None
        return None if left_s is None else min(max(0.0, left_s), _MAX_PAUSE_S)


def read_some(fd: int) -> bytes | None:
    """What a descriptor that does not block has; empty at its end, None when nothing yet."""
    try:
        return os.read(fd, _READ_AT_ONCE)
    except BlockingIOError:
        return None
