"""Long packets are left out of a broker's bytes, however they are cut."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.agents.membership.fleet.packets import BoundedSocket, BrokenStream, PacketFilter

MOST = 300


def packet(size: int, kind: int = 3) -> bytes:
    """A packet with `size` bytes after its header."""
    length, rest = b"", size
    while True:
        rest, digit = rest >> 7, rest & 127
        length += struct.pack("B", digit | (128 if rest else 0))
        if not rest:
            return bytes([kind << 4]) + length + bytes([size % 251]) * size


@given(sizes=st.lists(st.one_of(st.integers(0, 297), st.integers(298, 70_000)), max_size=8), data=st.data())
def test_short_packets_come_through_and_long_ones_do_not(sizes: list[int], data: st.DataObject) -> None:
    stream = b"".join(packet(size) for size in sizes)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    filtered = PacketFilter(MOST)
    packets: list[bytes] = []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        packets += filtered.feed(stream[begin:end])
        assert len(filtered._pending) <= MOST + 5
    short = [packet(size) for size in sizes if len(packet(size)) <= MOST]
    assert packets == short
    assert filtered.skipped == len(sizes) - len(short)


@pytest.mark.parametrize("stream", [b"\x30\xff\xff\xff\xff\x01", packet(70_000, kind=4)], ids=["length", "type"])
def test_what_is_not_mqtt_ends_the_connection(stream: bytes) -> None:
    with pytest.raises(BrokenStream):
        PacketFilter(MOST).feed(stream)


class Wire:
    """A socket whose bytes the test gives."""

    def __init__(self, *chunks: bytes) -> None:
        self.chunks = list(chunks)

    def recv(self, count: int) -> bytes:
        if not self.chunks:
            raise BlockingIOError
        return self.chunks.pop(0)

    def send(self, data: bytes) -> int:
        return len(data)

    def fileno(self) -> int:
        return -1

    def close(self) -> None: ...

    def setblocking(self, flag: bool) -> None: ...


def test_a_reader_gets_whole_packets_piece_by_piece() -> None:
    sock = BoundedSocket(Wire(packet(5)[:3], packet(5)[3:] + packet(400) + packet(2), b""), MOST)
    with pytest.raises(BlockingIOError):
        sock.recv(1)
    assert sock.recv(1) == packet(5)[:1]
    assert sock.waiting
    assert sock.recv(100) == packet(5)[1:]
    assert sock.recv(100) == packet(2)
    assert not sock.waiting
    assert sock.recv(1) == b""
