"""A bounded queue of what waits to be written on one connection. No I/O here."""

from collections import deque

from meshd.errors import Overloaded


class SendQueue:
    """Buffers in order, bounded by their bytes; large ones leave in pieces, without a copy."""

    def __init__(self, limit_bytes: int, piece_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.queued_bytes = 0
        self._piece_bytes = piece_bytes
        self._buffers: deque[memoryview] = deque()

    def __bool__(self) -> bool:
        return bool(self._buffers)

    def put(self, *buffers: bytes | memoryview) -> None:
        """Append all or, when they don't fit, nothing. Raises: Overloaded."""
        size = sum(len(buffer) for buffer in buffers)
        if self.queued_bytes + size > self.limit_bytes:
            raise Overloaded(
                f"{self.queued_bytes} bytes wait to be sent to this peer; {size} more would pass the limit of {self.limit_bytes}",
                retry_after_s=0.1,
            )
        self.queued_bytes += size
        self._buffers.extend(memoryview(buffer) for buffer in buffers if len(buffer))

    def take(self) -> memoryview:
        """The next piece. Raises: IndexError if there is none."""
        buffer = self._buffers[0]
        piece = buffer[: self._piece_bytes]
        if len(piece) == len(buffer):
            self._buffers.popleft()
        else:
            self._buffers[0] = buffer[self._piece_bytes :]
        self.queued_bytes -= len(piece)
        return piece

    def clear(self) -> None:
        """Let go of all that waits."""
        self._buffers.clear()
        self.queued_bytes = 0
