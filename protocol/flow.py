"""A bounded queue of bytes to write on one connection. No I/O."""

from collections import deque

from meshd.errors import Overloaded


class SendQueue:
    """A first-in, first-out queue of buffers with a limit on its total bytes. Large buffers are taken in chunks, without a copy."""

    def __init__(self, limit_bytes: int, chunk_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.queued_bytes = 0
        self._chunk_bytes = chunk_bytes
        self._buffers: deque[memoryview] = deque()

    def __bool__(self) -> bool:
        return bool(self._buffers)

    def put(self, *buffers: bytes | memoryview) -> None:
        """Append all buffers, or none if they exceed the limit. Raises: Overloaded."""
        size = sum(len(buffer) for buffer in buffers)
        if self.queued_bytes + size > self.limit_bytes:
            raise Overloaded(
                f"{self.queued_bytes} bytes wait to be sent to this peer; {size} more would pass the limit of {self.limit_bytes}",
                retry_after_s=0.1,
            )
        self.queued_bytes += size
        self._buffers.extend(memoryview(buffer) for buffer in buffers if len(buffer))

    def take(self) -> memoryview:
        """Remove and return the next chunk. Raises: IndexError if there is none."""
        buffer = self._buffers[0]
        chunk = buffer[: self._chunk_bytes]
        if len(chunk) == len(buffer):
            self._buffers.popleft()
        else:
            self._buffers[0] = buffer[self._chunk_bytes :]
        self.queued_bytes -= len(chunk)
        return chunk

    def clear(self) -> None:
        """Drop everything that is queued."""
        self._buffers.clear()
        self.queued_bytes = 0
