"""Makes frames of one step, and reads a byte stream with a FrameReader."""

from collections.abc import Iterable

from meshd.errors import ProtocolViolation
from meshd.protocol.framing import Frame, FrameLimits, FrameReader
from meshd.protocol.messages import Step, StepKind, Steps


def one_step(seq: int, size: int = 4, kind: StepKind = StepKind.DECODE) -> Steps:
    """Make the frame of one step whose payload has `size` bytes."""
    step = Step(
        session="5e" * 16, epoch=1, stage=1, seq=seq, start=seq, tokens=1, kind=kind, sample=1, committed=seq + 1, size=size
    )
    return Steps(steps=(step,))


def read_frames(
    stream: bytes, limits: FrameLimits, sizes: Iterable[int] = (65536,)
) -> tuple[list[Frame], ProtocolViolation | None]:
    """Pass a stream to a FrameReader in chunks of `sizes` bytes, repeating the last size.

    Returns: the frames, and the violation that ended the stream; None if there was none.
    """
    reader = FrameReader(limits)
    frames: list[Frame] = []
    next_sizes = iter(sizes)
    size = at = 0
    try:
        while at < len(stream):
            size = next(next_sizes, size) or 1
            buffer = reader.buffer()
            chunk = stream[at : at + min(size, len(buffer))]
            buffer[: len(chunk)] = chunk
            at += len(chunk)
            for frame in reader.received(len(chunk)):
                frames.append(frame)  # noqa: PERF402  (frames before a violation are returned too)
        reader.end()
    except ProtocolViolation as violation:
        return frames, violation
    return frames, None
