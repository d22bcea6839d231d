"""What has been answered and not yet acknowledged, so that nothing runs twice or is lost."""

from __future__ import annotations

from sandbox.protocol import encode

# More than any caller leaves unacknowledged; a caller that never does must not fill the memory.
_MAX_BYTES = 8 << 20
_MAX_FORGOTTEN = 10_000


class Results:
    """Frames by operation id, oldest first."""

    def __init__(self) -> None:
        """Starts empty."""
        self._frames: dict[str, bytes] = {}
        self._bytes = 0
        self._forgotten: dict[str, None] = {}

    def add(self, operation: str, frame: bytes) -> None:
        """Keeps an answer; the oldest ones make room, but are remembered to have been."""
        self._frames[operation] = frame
        self._bytes += len(frame)
        while self._bytes > _MAX_BYTES and len(self._frames) > 1:
            oldest = next(iter(self._frames))
            self.acknowledge(oldest)
            self._forgotten[oldest] = None
        while len(self._forgotten) > _MAX_FORGOTTEN:
            del self._forgotten[next(iter(self._forgotten))]

    def get(self, operation: str) -> bytes | None:
        """The answer given before to an operation, if there is one."""
        if operation in self._forgotten:
            message = f"operation {operation} is over, and its result was not kept so long."
            return encode({"id": operation, "error": "gone", "message": message})
        return self._frames.get(operation)

    def acknowledge(self, operation: str) -> None:
        """Drops an answer that has arrived."""
        self._bytes -= len(self._frames.pop(operation, b""))
