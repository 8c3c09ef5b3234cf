"""Frames do not depend on how a stream is cut into chunks; a broken stream raises ProtocolViolation within bounded memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from in_process.frames import read_frames
from meshd.errors import ProtocolViolation
from meshd.protocol.framing import KIB, MIB, FrameLimits, FrameReader, frame_head

Frames = list[tuple[bytes, bytes]]

SMALL = FrameLimits(max_header=64, max_payload=100_000)
frames_of = st.lists(st.tuples(st.binary(min_size=1, max_size=64), st.binary(max_size=200)), max_size=8)
chunkings = st.lists(st.integers(1, 300), min_size=1, max_size=40)


def stream_of(frames: Frames) -> bytes:
    return b"".join(frame_head(header, len(payload)) + payload for header, payload in frames)


@given(frames=frames_of, sizes=chunkings)
def test_any_chunking_gives_the_same_frames(frames: Frames, sizes: list[int]) -> None:
    read, violation = read_frames(stream_of(frames), SMALL, sizes)
    assert violation is None
    assert [(frame.header, bytes(frame.payload)) for frame in read] == frames


@given(size=st.integers(0, 100_000), sizes=st.lists(st.integers(1, 40_000), min_size=1, max_size=20))
def test_large_payloads_arrive_whole(size: int, sizes: list[int]) -> None:
    payload = bytes(range(256)) * (size // 256 + 1)
    frames = [(b"h", payload[:size]), (b"next", b"x")]
    read, violation = read_frames(stream_of(frames), SMALL, sizes)
    assert violation is None
    assert [(frame.header, bytes(frame.payload)) for frame in read] == frames


@given(frames=frames_of, junk=st.binary(max_size=400), sizes=chunkings)
def test_junk_reads_the_same_for_any_chunking(frames: Frames, junk: bytes, sizes: list[int]) -> None:
    stream = stream_of(frames) + junk
    once, fault = read_frames(stream, SMALL)
    again, same_fault = read_frames(stream, SMALL, sizes)
    assert [frame.header for frame in once] == [frame.header for frame in again]
    assert str(fault) == str(same_fault)
    assert len(once) >= len(frames)


@given(frames=frames_of.filter(bool), cut=st.integers(1, 200), sizes=chunkings)
def test_a_torn_stream_gives_the_whole_frames_and_one_violation(frames: Frames, cut: int, sizes: list[int]) -> None:
    whole = stream_of(frames[:-1])
    last = stream_of(frames[-1:])
    read, violation = read_frames(whole + last[: min(cut, len(last) - 1)], SMALL, sizes)
    assert len(read) == len(frames) - 1
    assert violation is not None


@pytest.mark.parametrize(("header_length", "payload_length"), [(0, 0), (65, 0), (2**32 - 1, 0), (1, 100_001), (1, 2**32 - 1)])
def test_lengths_are_checked_before_memory_is_allocated(header_length: int, payload_length: int) -> None:
    reader = FrameReader(SMALL)
    before = reader.held_bytes()
    reader.buffer()[:8] = header_length.to_bytes(4, "big") + payload_length.to_bytes(4, "big")
    with pytest.raises(ProtocolViolation):
        list(reader.received(8))
    assert reader.held_bytes() == before


def test_nothing_is_read_after_a_violation() -> None:
    reader = FrameReader(SMALL)
    reader.buffer()[:8] = bytes(8)
    with pytest.raises(ProtocolViolation):
        list(reader.received(8))
    good = stream_of([(b"h", b"")])
    reader.buffer()[: len(good)] = good
    with pytest.raises(ProtocolViolation):
        list(reader.received(len(good)))


@given(stream=st.binary(max_size=2000), sizes=chunkings)
def test_memory_is_bounded_by_one_frame(stream: bytes, sizes: list[int]) -> None:
    reader = FrameReader(SMALL)
    bound = reader.held_bytes() + SMALL.max_payload
    for size in sizes:
        chunk, stream = stream[:size], stream[size:]
        buffer = reader.buffer()
        buffer[: len(chunk)] = chunk
        try:
            list(reader.received(len(chunk)))
        except ProtocolViolation:
            break
        assert reader.held_bytes() <= bound


def test_a_header_larger_than_the_scratch_buffer_is_read() -> None:
    frames = [(b"h" * (200 * KIB), b"p" * 10), (b"k", b"")]
    read, violation = read_frames(stream_of(frames), FrameLimits(max_header=MIB, max_payload=100), (1000,))
    assert violation is None
    assert [(frame.header, bytes(frame.payload)) for frame in read] == frames


def test_each_payload_has_its_own_memory_and_a_large_one_is_read_in_place() -> None:
    reader = FrameReader(SMALL)
    head = frame_head(b"h", 90_000)
    reader.buffer()[: len(head)] = head
    assert list(reader.received(len(head))) == []
    buffer = reader.buffer()
    assert len(buffer) == 90_000
    buffer[:] = b"x" * 90_000
    (frame,) = reader.received(90_000)
    assert frame.payload.obj is buffer.obj
    (first, second), _ = read_frames(stream_of([(b"a", b"1"), (b"b", b"2")]), SMALL)
    first.payload[0] = 0
    assert bytes(second.payload) == b"2"


def test_the_time_of_a_payload_is_from_its_first_byte_to_its_last() -> None:
    times = iter([10.0, 12.5])
    reader = FrameReader(SMALL, now=lambda: next(times))
    stream = stream_of([(b"h", b"12345678"), (b"i", b"9")])
    for at in (slice(0, 12), slice(12, None)):
        chunk = stream[at]
        buffer = reader.buffer()[: len(chunk)]
        buffer[:] = chunk[: len(buffer)]
        frames = list(reader.received(len(buffer)))
    assert [frame.receive_s for frame in frames] == [2.5]
