"""Keeps the head and the tail of a stream in bounded memory and counts the rest.

Standard library only and Python 3.9: the agent carries this module into the sandbox.
"""

from __future__ import annotations


class HeadTail:
    """Collects a stream of bytes of any length in at most about two times `limit` bytes."""

    def __init__(self, limit: int) -> None:
        """Keeps at most `limit` bytes of what is fed."""
        self.total = 0
        self._head_size = limit // 2
        self._tail_size = limit - self._head_size
        self._head = bytearray()
        self._tail = bytearray()

    def feed(self, data: bytes) -> bytes:
        """Adds the next bytes of the stream; returns those that belong to the head."""
        self.total += len(data)
        room = self._head_size - len(self._head)
        fresh = data[:room] if room > 0 else b""
        self._head += fresh
        data = data[len(fresh) :]
        self._tail += data[-self._tail_size :]
        # Trimming only at twice the size makes the cost a byte constant.
        if len(self._tail) > 2 * self._tail_size:
            del self._tail[: -self._tail_size]
        return fresh

    def take(self) -> tuple[bytes, bytes, int]:
        """Head, tail and the number of bytes fed; begins anew."""
        kept = bytes(self._head), bytes(self._tail[-self._tail_size :]), self.total
        self._head, self._tail, self.total = bytearray(), bytearray(), 0
        return kept


def text_of(head: bytes, tail: bytes, total: int) -> str:
    """What was kept, as text, with a marker line where bytes were left out."""
    left_out = total - len(head) - len(tail)
    if left_out == 0:
        return (head + tail).decode("utf-8", "replace")
    marker = f"\n[... {left_out} bytes left out ...]\n"
    return head.decode("utf-8", "replace") + marker + tail.decode("utf-8", "replace")
