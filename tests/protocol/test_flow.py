"""The queue before a socket: in order, in pieces, and never more than its limit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.errors import Overloaded
from meshd.protocol.flow import SendQueue


@given(buffers=st.lists(st.binary(max_size=50), max_size=10), piece=st.integers(1, 30))
def test_what_goes_in_comes_out_in_order_and_in_pieces(buffers: list[bytes], piece: int) -> None:
    queue = SendQueue(10_000, piece)
    for buffer in buffers:
        queue.put(buffer)
    out = []
    while queue:
        out.append(queue.take())
        assert len(out[-1]) <= piece
    assert b"".join(out) == b"".join(buffers)
    assert queue.queued_bytes == 0


def test_what_does_not_fit_is_refused_whole() -> None:
    queue = SendQueue(10, 4)
    queue.put(b"123456")
    with pytest.raises(Overloaded):
        queue.put(b"12", b"345")
    assert queue.queued_bytes == 6
    queue.put(b"1234")
    queue.clear()
    assert not queue
    assert queue.queued_bytes == 0


def test_pieces_are_views_of_what_was_given() -> None:
    data = bytearray(b"abcdef")
    queue = SendQueue(10, 4)
    queue.put(memoryview(data))
    piece = queue.take()
    data[0] = ord("z")
    assert bytes(piece) == b"zbcd"
