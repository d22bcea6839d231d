"""Frames between the service and the agent inside a sandbox, over a Unix stream socket.

    frame   = header length (4 bytes, big-endian), payload length (4 bytes), header, payload
    header  = a JSON object in UTF-8; the payload is raw bytes

The service sends requests, each with an `id` and an `op`; the agent answers each id once it is
done. Sending a request again is harmless: an id that runs is not started twice, and a result is
kept and sent again until a later request lists the id in `ack`. Nothing in the bytes of a
command's output can be taken for the protocol's own.

Standard library only and Python 3.9: the agent carries this module into the sandbox.
"""

from __future__ import annotations

import json
import struct

VERSION = 1

MAX_HEADER = 1 << 20

# In the directory of the socket: the seconds for which the agent was frozen, all together.
FROZEN_FILE = "frozen"

_LENGTHS = struct.Struct(">II")

# As in `typing`, whose import a sandbox would wait for.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Header = dict[str, Any]
else:
    Header = dict


class ProtocolError(Exception):
    """The peer sent what is no frame; `str(error)` says in what way."""


def encode(header: Header, payload: bytes = b"") -> bytes:
    """The bytes of one frame."""
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "surrogateescape"
    )
    return b"".join((_LENGTHS.pack(len(text), len(payload)), text, payload))


class Decoder:
    """Cuts a stream of bytes into frames, holding at most one frame that is not whole."""

    def __init__(self, max_payload: int) -> None:
        """Takes payloads of at most `max_payload` bytes."""
        self._max_payload = max_payload
        self._data = bytearray()

    def feed(self, data: bytes) -> list[tuple[Header, bytes]]:
        """Adds the next bytes of the stream; returns the frames that they complete.

        Raises:
            ProtocolError: a length over its limit, or a header that is no JSON object.
        """
        self._data += data
        frames: list[tuple[Header, bytes]] = []
        while len(self._data) >= _LENGTHS.size:
            header_size, payload_size = _LENGTHS.unpack_from(self._data)
            if header_size > MAX_HEADER or payload_size > self._max_payload:
                raise ProtocolError(f"a frame of {header_size} and {payload_size} bytes")
            middle = _LENGTHS.size + header_size
            end = middle + payload_size
            if len(self._data) < end:
                break
            header = _header(self._data[_LENGTHS.size : middle])
            frames.append((header, bytes(self._data[middle:end])))
            del self._data[:end]
        return frames


def _header(text: bytearray) -> Header:
    try:
        header = json.loads(text.decode())
    except (ValueError, RecursionError):
        raise ProtocolError("a header that is no JSON") from None
    if not isinstance(header, dict):
        raise ProtocolError("a header that is no object")
    return header
