"""Bounds what an MQTT broker can make this process read: long packets are skipped while they arrive, and packets have a budget.

paho, the library under aiomqtt, reads a packet of up to 256 MiB into memory before it looks at it, and every packet that is there.
It gets its bytes through `BoundedSocket` instead of the socket itself. House rules of this file: no event loop; the socket is a
parameter.
"""

from typing import Protocol

_CHUNK = 16 << 10
_PUBLISH = 3
_MAX_LENGTH_BYTES = 4


class BrokenStream(ConnectionError):
    """The broker's bytes are not MQTT."""


class PacketFilter:
    """Takes a stream of MQTT packets apart, and leaves out PUBLISH packets that are too long. Memory: at most one short packet.

    A long packet of another type ends the connection: brokers don't send them.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._pending = bytearray()
        self._skip = 0
        self.skipped = 0
        """Number of packets that were left out."""

    def feed(self, data: bytes) -> list[bytes]:
        """Add bytes. Returns: the packets that are whole now. Raises: BrokenStream."""
        if self._skip:
            dropped = min(self._skip, len(data))
            self._skip -= dropped
            data = data[dropped:]
        self._pending += data
        packets: list[bytes] = []
        while (size := self._next_size()) is not None:
            if size > self._most:
                self._leave_out(size)
            elif len(self._pending) >= size:
                packets.append(bytes(self._pending[:size]))
                del self._pending[:size]
            else:
                break
        return packets

    def _next_size(self) -> int | None:
        """Returns: the size of the next packet with its header; None if its header is not whole yet."""
        length = 0
        for place in range(1, _MAX_LENGTH_BYTES + 1):
            if place >= len(self._pending):
                return None
            length |= (self._pending[place] & 127) << (7 * (place - 1))
            if not self._pending[place] & 128:
                return 1 + place + length
        raise BrokenStream("the length of a packet has more than four bytes")

    def _leave_out(self, size: int) -> None:
        if self._pending[0] >> 4 != _PUBLISH:
            raise BrokenStream(f"a packet of type {self._pending[0] >> 4} has {size} bytes")
        self.skipped += 1
        self._skip = max(0, size - len(self._pending))
        del self._pending[:size]


class RawSocket(Protocol):
    """What is used of a socket, with or without TLS."""

    def recv(self, count: int, /) -> bytes: ...
    def send(self, data: bytes, /) -> int: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...
    def setblocking(self, flag: bool, /) -> None: ...


class BoundedSocket:
    """A socket whose received bytes went through a `PacketFilter`. It has the methods that paho uses."""

    def __init__(self, raw: RawSocket, most: int) -> None:
        self._raw = raw
        self.filter = PacketFilter(most)
        self._packets: list[bytes] = []
        """Whole packets, the next one last."""
        self._rest = b""
        """What paho has not read yet of the packet that it reads."""

    @property
    def waiting(self) -> bool:
        """Whether a whole packet can be read without the network."""
        return bool(self._packets)

    def recv(self, count: int) -> bytes:
        """Read from the packet at hand. Raises: BlockingIOError if there is none; BrokenStream; OSError."""
        if not self._rest and not self._packets:
            data = self._raw.recv(_CHUNK)
            if not data:
                return b""
            self._packets = self.filter.feed(data)[::-1]
        if not self._rest:
            if not self._packets:
                raise BlockingIOError
            self._rest = self._packets.pop()
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken

    def pending(self) -> int:
        """Returns: how many bytes the layer of TLS has decrypted already; no event of the system announces them."""
        pending = getattr(self._raw, "pending", None)
        return int(pending()) if pending is not None else 0

    def send(self, data: bytes) -> int:
        return self._raw.send(data)

    def fileno(self) -> int:
        return self._raw.fileno()

    def close(self) -> None:
        self._raw.close()

    def setblocking(self, flag: bool) -> None:
        self._raw.setblocking(flag)
