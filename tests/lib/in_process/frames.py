"""A stream through a FrameReader."""

from collections.abc import Iterable

from meshd.errors import ProtocolViolation
from meshd.protocol.framing import Frame, FrameLimits, FrameReader


def read_frames(
    stream: bytes, limits: FrameLimits, sizes: Iterable[int] = (65536,)
) -> tuple[list[Frame], ProtocolViolation | None]:
    """Read a stream `sizes` bytes at a time (the last size repeats): the frames, and the fault that ended it, if one did."""
    reader = FrameReader(limits)
    frames: list[Frame] = []
    turns = iter(sizes)
    size = at = 0
    try:
        while at < len(stream):
            size = next(turns, size) or 1
            room = reader.buffer()
            chunk = stream[at : at + min(size, len(room))]
            room[: len(chunk)] = chunk
            at += len(chunk)
            for frame in reader.received(len(chunk)):
                frames.append(frame)  # noqa: PERF402  (what came before a fault counts)
        reader.end()
    except ProtocolViolation as violation:
        return frames, violation
    return frames, None
