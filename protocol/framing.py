"""Cuts a byte stream into frames. No I/O.

A frame is `u32 header length | u32 payload length | header | payload`, both lengths big-endian. A length is checked before
memory is allocated for it: a `FrameReader` never holds more than its scratch buffer and one payload.
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
"""The largest header, in bytes, that this build accepts and announces in HELLO."""
MAX_HEADER_HARD = MIB
"""The largest `max_header`, in bytes, that a HELLO may have."""
MAX_PAYLOAD = 16 * MIB
_SCRATCH = 32 * KIB
"""Size of the scratch buffer. A decode step's activation fits in it, and of a larger payload at most this much is copied."""
EMPTY = memoryview(b"")


class FrameLimits(msgspec.Struct, frozen=True):
    """The largest header and payload, in bytes, that one side of a connection accepts."""

    max_header: int = MAX_HEADER
    max_payload: int = MAX_PAYLOAD


class Frame(msgspec.Struct, frozen=True):
    """One received frame. The payload's buffer is new for each frame, and the receiver of the frame owns it."""

    header: bytes
    payload: memoryview
    receive_s: float = 0.0
    """Seconds from the first bytes of the payload to the last; 0 if they arrived together."""


class FrameReader:
    """Cuts a stream into frames, reading large payloads straight into their final buffer.

    Fill `buffer()` from the stream, then pass the number of bytes to `received()`. The frames do not depend on how the stream is
    chunked. After a ProtocolViolation nothing more can be read.
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
        """Return the memory for the next bytes; never empty."""
        if self._payload:
            return self._payload[self._filled :]
        return self._scratch[self._have :]

    def received(self, count: int) -> Iterator[Frame]:
        """Yield the frames that `count` more bytes complete. Exhaust the iterator before the next call.

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
        """End the stream. Raises: ProtocolViolation if it ends within a frame."""
        if self._broken is None and (self._have or self._payload):
            raise self._break("the stream ended within a frame")

    def held_bytes(self) -> int:
        """Return the bytes of memory allocated for frames that are not complete."""
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

    def _keep(self, at: int, required: int) -> None:
        """Move the unread bytes to the front of a scratch buffer with space for more than `required` bytes."""
        rest = self._scratch[at : self._have]
        if required >= len(self._scratch):
            self._scratch = memoryview(bytearray(required + _SCRATCH))
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
    """Encode the part of a frame before its payload."""
    return PREFIX.pack(len(header), payload_length) + header
