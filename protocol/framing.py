"""Frames: bytes in, frames out. No I/O here.

A frame is `u32 header length | u32 payload length | header | payload`, both lengths big-endian. No memory is taken for a length
before it is checked: a `FrameReader` never holds more than its scratch buffer and one payload.
"""

import struct
import time
from collections.abc import Callable, Iterator

import msgspec

from meshd.errors import ProtocolViolation

PREFIX = struct.Struct(">II")
KIB = 1024
MIB = 1024 * KIB
MAX_HEADER = 64 * KIB
"""What a peer of this build accepts; HELLO says so."""
MAX_HEADER_HARD = MIB
"""No HELLO may promise to accept more."""
MAX_PAYLOAD = 16 * MIB
_SCRATCH = 32 * KIB
"""Read in one go while no payload is under way: a decode step's activation fits, and no more than this of a frame is copied."""
EMPTY = memoryview(b"")


class FrameLimits(msgspec.Struct, frozen=True):
    """The largest header and payload, in bytes, that a side accepts."""

    max_header: int = MAX_HEADER
    max_payload: int = MAX_PAYLOAD


class Frame(msgspec.Struct, frozen=True):
    """One frame as it came. The payload's buffer is new for each frame and belongs to whoever takes it."""

    header: bytes
    payload: memoryview
    receive_s: float = 0.0
    """From the first bytes of the payload to the last; 0 if they came at once."""


class FrameReader:
    """Cuts a stream into frames, reading large payloads straight into their final buffer.

    Fill `buffer()` from the stream, then say with `received()` how much came. However the stream is chunked, the frames are the
    same. After a ProtocolViolation nothing more can be read.
    """

    def __init__(self, limits: FrameLimits, now: Callable[[], float] = time.perf_counter) -> None:
        self.limits = limits
        self._now = now
        self._scratch = memoryview(bytearray(_SCRATCH))
        self._have = 0
        self._header = b""
        self._payload = EMPTY
        self._filled = 0
        self._began = 0.0
        self._broken: ProtocolViolation | None = None

    def buffer(self) -> memoryview:
        """Where the next bytes belong; never empty."""
        if self._payload:
            return self._payload[self._filled :]
        return self._scratch[self._have :]

    def received(self, count: int) -> Iterator[Frame]:
        """The frames that `count` more bytes complete. Exhaust it before the next call.

        Raises: ProtocolViolation after the frames that came before the fault.
        """
        if self._broken:
            raise self._broken
        if not self._payload:
            self._have += count
            yield from self._cut()
            return
        self._filled += count
        if self._filled == len(self._payload):
            yield self._take_payload()

    def end(self) -> None:
        """The stream has ended. Raises: ProtocolViolation if that tears a frame."""
        if self._broken is None and (self._have or self._payload):
            raise self._break("the stream ended within a frame")

    def held_bytes(self) -> int:
        """Memory taken for what has not been handed out yet."""
        return len(self._scratch) + len(self._payload)

    def _cut(self) -> Iterator[Frame]:
        at = 0
        while self._have - at >= PREFIX.size and not self._payload:
            header_length, payload_length = PREFIX.unpack_from(self._scratch, at)
            self._check(header_length, payload_length)
            body = at + PREFIX.size + header_length
            if body > self._have:
                self._keep(at, PREFIX.size + header_length)
                return
            self._header = bytes(self._scratch[at + PREFIX.size : body])
            at = min(self._have, body + payload_length)
            if at - body == payload_length:
                yield Frame(self._header, memoryview(bytearray(self._scratch[body:at])) if payload_length else EMPTY)
            else:
                self._begin_payload(payload_length, self._scratch[body:at])
        self._keep(at, PREFIX.size)

    def _check(self, header_length: int, payload_length: int) -> None:
        if not 0 < header_length <= self.limits.max_header:
            raise self._break(f"a header of {header_length} bytes, where 1 to {self.limits.max_header} are allowed")
        if payload_length > self.limits.max_payload:
            raise self._break(f"a payload of {payload_length} bytes, where {self.limits.max_payload} are allowed")

    def _break(self, reason: str) -> ProtocolViolation:
        self._broken = ProtocolViolation(reason)
        self._payload = EMPTY
        self._have = 0
        return self._broken

    def _keep(self, at: int, need: int) -> None:
        """Move what is left to the front of a scratch buffer that holds `need` bytes and more."""
        rest = self._scratch[at : self._have]
        if need >= len(self._scratch):
            self._scratch = memoryview(bytearray(need + _SCRATCH))
            self._scratch[: len(rest)] = rest
        elif at:
            self._scratch[: len(rest)] = bytes(rest)
        self._have = len(rest)

    def _begin_payload(self, length: int, first: memoryview) -> None:
        self._payload = memoryview(bytearray(length))
        self._payload[: len(first)] = first
        self._filled = len(first)
        self._began = self._now()

    def _take_payload(self) -> Frame:
        frame = Frame(self._header, self._payload, self._now() - self._began)
        self._payload = EMPTY
        return frame


def frame_head(header: bytes, payload_length: int) -> bytes:
    """What goes before the payload."""
    return PREFIX.pack(len(header), payload_length) + header
