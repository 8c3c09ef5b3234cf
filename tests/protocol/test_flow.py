"""The send queue: in order, in chunks, and never beyond its limit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.errors import Overloaded
from meshd.protocol.flow import SendQueue


@given(buffers=st.lists(st.binary(max_size=50), max_size=10), chunk=st.integers(1, 30))
def test_buffers_are_taken_in_order_and_in_chunks(buffers: list[bytes], chunk: int) -> None:
    queue = SendQueue(10_000, chunk)
    for buffer in buffers:
        queue.put(buffer)
    out = []
    while queue:
        out.append(queue.take())
        assert len(out[-1]) <= chunk
    assert b"".join(out) == b"".join(buffers)
    assert queue.queued_bytes == 0


def test_buffers_that_exceed_the_limit_together_are_all_refused() -> None:
    queue = SendQueue(10, 4)
    queue.put(b"123456")
    with pytest.raises(Overloaded):
        queue.put(b"12", b"345")
    assert queue.queued_bytes == 6
    queue.put(b"1234")
    queue.clear()
    assert not queue
    assert queue.queued_bytes == 0


def test_chunks_are_views_of_the_queued_buffers() -> None:
    data = bytearray(b"abcdef")
    queue = SendQueue(10, 4)
    queue.put(memoryview(data))
    chunk = queue.take()
    data[0] = ord("z")
    assert bytes(chunk) == b"zbcd"
