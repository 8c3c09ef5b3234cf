"""A bounded queue of bytes to write on one connection. No I/O."""

from collections import deque
from itertools import islice

from meshd.errors import Overloaded


class SendQueue:
    """A first-in, first-out queue of frames with a limit on its total bytes. Large buffers are taken in chunks, without a copy."""

    def __init__(self, limit_bytes: int, chunk_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.queued_bytes = 0
        self._chunk_bytes = chunk_bytes
        self._buffers: deque[memoryview] = deque()
        self._current = 0
        """Number of buffers at the front that belong to a frame of which a part has been taken already."""
        self._frames: deque[int] = deque()
        """Number of buffers of each frame that is queued whole."""

    def __bool__(self) -> bool:
        return bool(self._buffers)

    def put(self, *buffers: bytes | memoryview, begun: bool = False) -> None:
        """Append the buffers of one frame, or none if they exceed the limit. Raises: Overloaded.

        `begun`: a part of the frame has been written already, past this queue, which must be empty.
        """
        size = sum(len(buffer) for buffer in buffers)
        if self.queued_bytes + size > self.limit_bytes:
            raise Overloaded(
                f"{self.queued_bytes} bytes wait to be sent to this peer; {size} more would pass the limit of {self.limit_bytes}",
                retry_after_s=0.1,
            )
        self.queued_bytes += size
        parts = [memoryview(buffer) for buffer in buffers if len(buffer)]
        self._buffers.extend(parts)
        if begun:
            self._current = len(parts)
        elif parts:
            self._frames.append(len(parts))

    def take(self) -> memoryview:
        """Remove and return the next chunk. Raises: IndexError if there is none."""
        buffer = self._buffers[0]
        if not self._current:
            self._current = self._frames.popleft()
        chunk = buffer[: self._chunk_bytes]
        if len(chunk) == len(buffer):
            self._buffers.popleft()
            self._current -= 1
        else:
            self._buffers[0] = buffer[self._chunk_bytes :]
        self.queued_bytes -= len(chunk)
        return chunk

    def clear(self) -> None:
        """Drop everything that is queued."""
        self._buffers.clear()
        self._frames.clear()
        self._current = self.queued_bytes = 0

    def keep_current(self) -> None:
        """Drop every frame of which nothing has been taken yet."""
        current = list(islice(self._buffers, self._current))
        self._buffers = deque(current)
        self._frames.clear()
        self.queued_bytes = sum(len(buffer) for buffer in current)
