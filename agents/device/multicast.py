"""Checks that mDNS's multicast passes, with questions that no responder answers.

A check has a nonce. One side asks for the name `NONCE._meshd._tcp.local`, the other hears the question, or not. The sockets are
opened for one check only. They share port 5353 with other responders: each of them receives every multicast packet.
"""

import asyncio
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

GROUP, PORT = "224.0.0.251", 5353
SEND_AT_S = (0.0, 0.1, 0.4, 0.8)
"""When the question is sent. The other side may begin to listen a round trip later than this side, and packets may be lost."""
HEAR_S = 1.2
"""How long a check listens."""
_TXT, _IN = 16, 1
_MOST_BYTES = 512


def question(nonce: str) -> bytes:
    """Make the DNS message that asks for a nonce's name (RFC 1035, section 4.1)."""
    labels = (nonce, "_meshd", "_tcp", "local")
    name = b"".join(bytes([len(label)]) + label.encode("ascii") for label in labels) + b"\0"
    return struct.pack("!6H", 0, 0, 1, 0, 0, 0) + name + struct.pack("!2H", _TXT, _IN)


@contextmanager
def listening(addresses: Iterable[str]) -> Iterator[socket.socket]:
    """Open a socket that receives mDNS's packets on the interfaces with these IPv4 addresses. Raises: OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.setblocking(False)
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            with suppress(OSError):  # not every kernel that knows it supports it for UDP
                receiver.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        receiver.bind(("", PORT))
        for address in addresses:
            membership = socket.inet_aton(GROUP) + socket.inet_aton(address)
            receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        yield receiver


def send(nonce: str, address: str) -> None:
    """Send the question once on the interface with this address, to this machine's own sockets too. Raises: OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(address))
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
        sender.sendto(question(nonce), (GROUP, PORT))


async def hear(receiver: socket.socket, nonce: str, *, within_s: float = HEAR_S) -> bool:
    """Wait for the question of a nonce. Returns: whether it came in time."""
    wanted = question(nonce)
    loop = asyncio.get_running_loop()
    heard: asyncio.Future[bool] = loop.create_future()

    def read() -> None:
        # A level-triggered reader: what is not read now is read in the loop's next turn.
        with suppress(OSError):
            if receiver.recv(_MOST_BYTES) == wanted and not heard.done():
                heard.set_result(True)

    loop.add_reader(receiver, read)  # uvloop has no sock_recvfrom
    try:
        async with asyncio.timeout(within_s):
            return await heard
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(receiver)


async def send_repeatedly(nonce: str, addresses: Iterable[str], on_error: Callable[[str, OSError], None]) -> None:
    """Send the question on each interface at the times in `SEND_AT_S`. `on_error(address, error)` is called for each failure."""
    where, passed_s = tuple(addresses), 0.0
    for at_s in SEND_AT_S:
        await asyncio.sleep(at_s - passed_s)
        passed_s = at_s
        for address in where:
            try:
                send(nonce, address)
            except OSError as error:
                on_error(address, error)


async def ask_and_hear(own_nonce: str, other_nonce: str, addresses: Iterable[str]) -> bool:
    """Send the question of one nonce and listen for that of the other. Returns: whether it was heard. Raises: OSError."""
    where = tuple(addresses)
    with listening(where) as receiver:
        sending = asyncio.create_task(send_repeatedly(own_nonce, where, lambda address, error: None))
        try:
            heard = await hear(receiver, other_nonce)
            await sending  # the other side may not have heard this one yet
        finally:
            sending.cancel()
    return heard


async def heard_itself(nonce: str, address: str) -> bool:
    """Whether this device receives on an interface what it multicasts there. Raises: OSError if it can't send or listen."""
    with listening((address,)) as receiver:
        failures: list[OSError] = []
        sending = asyncio.create_task(send_repeatedly(nonce, (address,), lambda _, error: failures.append(error)))
        try:
            heard = await hear(receiver, nonce)
        finally:
            sending.cancel()
    if not heard and failures:
        raise failures[0]
    return heard
