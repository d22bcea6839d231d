"""Keeping head and tail of a stream."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from sandbox.output import HeadTail, text_of


@given(st.lists(st.binary(max_size=50)), st.integers(2, 64))
def test_head_and_tail_are_the_streams_own(chunks: list[bytes], limit: int) -> None:
    chunks = [bytes(b % 64 + 48 for b in chunk) for chunk in chunks]
    stream = b"".join(chunks)
    kept = HeadTail(limit)
    for chunk in chunks:
        kept.feed(chunk)
    assert kept.total == len(stream)
    text = text_of(*kept.take())
    assert kept.total == 0
    if len(stream) <= limit:
        assert text == stream.decode()
        return
    head, count, tail = re.split(r"\n\[\.\.\. (\d+) bytes left out \.\.\.\]\n", text)
    assert len(head) + len(tail) == limit
    assert int(count) == len(stream) - limit
    assert stream.decode().startswith(head) and stream.decode().endswith(tail)
