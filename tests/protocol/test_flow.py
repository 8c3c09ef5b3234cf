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


@given(frames=st.lists(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=3), max_size=6), taken=st.integers(0, 8))
def test_the_frame_of_which_a_part_was_taken_is_kept_and_others_are_dropped(frames: list[list[bytes]], taken: int) -> None:
    queue = SendQueue(10_000, 7)
    for frame in frames:
        queue.put(*frame)
    out = b""
    while queue and taken:
        out += queue.take()
        taken -= 1
    queue.keep_current()
    size = queue.queued_bytes
    rest = b""
    while queue:
        rest += queue.take()
    assert len(rest) == size
    whole = [b"".join(frame) for frame in frames]
    assert out + rest in [b"".join(whole[:count]) for count in range(len(whole) + 1)]
