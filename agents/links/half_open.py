"""Limits the accepted connections that have not completed TLS and HELLO yet, so that a flood of them does not keep peers out."""

import ipaddress
from collections import Counter
from collections.abc import Callable


class HalfOpen:
    """The connections whose handshake is under way, oldest first.

    A new connection is always let in, and takes the place of an older one when there is no room. A handshake takes milliseconds,
    so a peer that joins is through before its connection is the oldest, unless it shares its address with a very fast flood.
    """

    def __init__(self, most: int) -> None:
        """`most` connections are allowed, and half as many from one host."""
        self.most = most
        self.most_per_host = max(1, most // 2)
        self._entries: dict[int, tuple[str, Callable[[], object]]] = {}
        self._last = 0

    def __len__(self) -> int:
        return len(self._entries)

    def enter(self, host: str, end: Callable[[], object]) -> int:
        """Add a connection. `end` is called if the connection must make room. Returns: a number to pass to `leave`."""
        origin = origin_of(host)
        counts = Counter(known for known, _ in self._entries.values())
        if counts[origin] >= self.most_per_host:
            self._end_oldest(origin)
        elif len(self._entries) >= self.most:
            self._end_oldest(counts.most_common(1)[0][0])
        self._last += 1
        self._entries[self._last] = origin, end
        return self._last

    def leave(self, number: int) -> None:
        """Remove a connection, if it has not made room already."""
        self._entries.pop(number, None)

    def _end_oldest(self, origin: str) -> None:
        oldest = next(number for number, (known, _) in self._entries.items() if known == origin)
        _, end = self._entries.pop(oldest)
        end()


def origin_of(host: str) -> str:
    """Returns: what counts as one host in limits: an IPv4 address, or the /64 network of an IPv6 address, which is one LAN."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        return str(mapped) if mapped is not None else str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
