"""The connection to an MQTT broker: kept up with back-off, bounded in what it reads. The only file that imports aiomqtt.

MQTT 3.1.1, which every broker has. Messages are published with QoS 1, so that the broker's acknowledgement paces a publisher, and
subscribed to with QoS 0: what is lost is sent again later (presence) or repeated by its sender (jobs).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import aiomqtt
import paho.mqtt.client as paho

from meshd.agents.budget import TokenBucket
from meshd.agents.membership.fleet.packets import BoundedSocket
from meshd.agents.membership.fleet.topics import PACKET_BYTES
from meshd.agents.supervisor import raise_if_cancelled
from meshd.clock import Clock
from meshd.errors import PeerLost
from meshd.values import BrokerUrl

T = TypeVar("T")

log = logging.getLogger(__name__)

CONNECT_S = 10.0
"""How long to wait for the broker's acknowledgement of a connection, a subscription or a message."""
_KEEPALIVE_S = 20
"""The broker publishes the last will after one and a half times as long without a packet."""
_FIRST_S, _LONGEST_S = 0.5, 30.0
"""Back-off after a failed or broken connection."""
_STEADY_S = 10.0
"""A connection that lasted this long resets the back-off."""
_PACKETS_S, _PACKETS_AT_ONCE = 300.0, 2000
"""Packets that are read per second. A flood waits at the broker; a packet with a presence costs 0.15 ms
(measured at mosquitto on two cores), so that it takes 5 % of a core."""
_AT_A_TIME = 16
"""Packets that are read before the event loop does other work: 2 ms."""
_PAUSE_S = 0.1
"""Shortest time for which no packets are read when the budget is used up, so that several are read at a time then."""
_FAREWELL_S = 0.7

_quiet = logging.getLogger("meshd.mqtt.paho")
_quiet.setLevel(logging.CRITICAL)


class Session(Protocol):
    """What the broker's user does with the connection."""

    def will(self) -> tuple[str, bytes]:
        """Return topic and payload of the retained last will of the connection that is about to be made."""
        ...

    def on_message(self, topic: str, payload: bytes) -> None:
        """Handle a received message. Must return soon."""
        ...

    async def connected(self) -> None:
        """Called as a task when a connection is up, and cancelled when it ends."""
        ...

    def farewell(self) -> Sequence[tuple[str, bytes, bool]]:
        """Return what to publish before the connection is closed on purpose: topic, payload, whether it is retained."""
        ...

    def on_trouble(self, reason: str) -> None:
        """Called when a connection failed or ended, and with an empty reason when one is up."""
        ...


@dataclass(frozen=True, slots=True)
class BrokerSettings:
    """How to connect."""

    url: BrokerUrl
    ca_file: str = ""
    """File of the authorities that may certify the broker. Empty: those of the system."""
    client_id: str = ""
    subscriptions: tuple[str, ...] = ()


class Broker:
    """Keeps a connection to the broker."""

    def __init__(self, settings: BrokerSettings, session: Session, clock: Clock) -> None:
        self._settings = settings
        self._session = session
        self._clock = clock
        self._client: _BoundedClient | None = None
        self._up = asyncio.Event()
        self._broken = asyncio.Event()

    @property
    def up(self) -> bool:
        """Whether the connection is up."""
        return self._client is not None

    @property
    def skipped(self) -> int:
        """Number of packets that were too long, on the present connection."""
        return self._client.skipped if self._client is not None else 0

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish a message and wait for the acknowledgement. Raises: PeerLost if there is no connection or it breaks."""
        if (client := self._client) is None:
            raise PeerLost("there is no connection to the MQTT broker")
        try:
            await client.publish(topic, payload, qos=1, retain=retain, timeout=CONNECT_S)
        except (aiomqtt.MqttError, ValueError) as error:
            self._broken.set()
            raise PeerLost(f"the MQTT broker did not take a message: {error}") from error

    async def publish_in(self, seconds: float, topic: str, payload: bytes) -> None:
        """Publish a message, also on a later connection, which may deliver it twice. Raises: PeerLost after `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                while True:
                    await self._up.wait()
                    try:
                        return await self.publish(topic, payload)
                    except PeerLost:
                        await self._clock.sleep(_FIRST_S)
        except TimeoutError as error:
            raise PeerLost(f"the MQTT broker took no message for {seconds:.0f} s") from error

    async def run(self) -> None:
        """Connect, and connect again when the connection ends. Cancel: says farewell, for at most `_FAREWELL_S`."""
        failures = 0
        while True:
            began = self._clock.monotonic()
            reason = ""
            try:
                await self._connect_and_serve()
            except* (aiomqtt.MqttError, PeerLost, OSError, ValueError) as group:
                reason = _reason(group)
            raise_if_cancelled()
            self._session.on_trouble(reason or "it closed the connection")
            failures = 1 if self._clock.monotonic() - began >= _STEADY_S else failures + 1
            await self._clock.sleep(self._back_off_s(failures))

    def _back_off_s(self, failures: int) -> float:
        chance = int.from_bytes(self._clock.random_bytes(4), "big") / 2**32
        return min(_LONGEST_S, _FIRST_S * 2.0 ** min(failures - 1, 10)) * (0.5 + chance / 2)

    async def _connect_and_serve(self) -> None:
        client = self._make_client()
        self._broken.clear()
        try:
            await client.__aenter__()
            try:
                for topic in self._settings.subscriptions:
                    await client.subscribe(topic, qos=0)
                self._client = client
                self._up.set()
                self._session.on_trouble("")
                await self._serve(client)
            except asyncio.CancelledError:
                await self._say_farewell(client)
                raise
            finally:
                self._client = None
                self._up.clear()
        finally:
            client.abandon()

    def _make_client(self) -> "_BoundedClient":
        url, (topic, payload) = self._settings.url, self._session.will()
        return _BoundedClient(
            self._session.on_message,
            url.host,
            url.port,
            username=url.user or None,
            password=url.password or None,
            identifier=self._settings.client_id,
            will=aiomqtt.Will(topic, payload, qos=1, retain=True),
            keepalive=_KEEPALIVE_S,
            timeout=CONNECT_S,
            tls_params=aiomqtt.TLSParameters(ca_certs=self._settings.ca_file or None) if url.tls else None,
            logger=_quiet,
        )

    async def _serve(self, client: "_BoundedClient") -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._session.connected())
            tasks.create_task(self._until_broken())
            await client.until_disconnected()

    async def _until_broken(self) -> None:
        await self._broken.wait()
        raise PeerLost("the broker did not take a message in time")

    async def _say_farewell(self, client: "_BoundedClient") -> None:
        with suppress(aiomqtt.MqttError, TimeoutError, ValueError, OSError):
            async with asyncio.timeout(_FAREWELL_S):
                messages = self._session.farewell()
                await asyncio.gather(*(client.publish(topic, data, qos=1, retain=retain) for topic, data, retain in messages))
                # Without a DISCONNECT, the broker would publish the last will.
                await client.__aexit__(None, None, None)


class _BoundedClient(aiomqtt.Client):
    """aiomqtt's client with bounds on what it reads: paho has none."""

    def __init__(self, on_message: Callable[[str, bytes], None], *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._handle = on_message
        self._budget = TokenBucket(_PACKETS_S, _PACKETS_AT_ONCE)
        self._bounded: BoundedSocket | None = None
        self._resume: asyncio.TimerHandle | asyncio.Handle | None = None
        self._abandoned = False
        self._client.connect_timeout = CONNECT_S
        self._client.max_inflight_messages_set(20)
        self._client._ssl_wrap_socket = self._begin_tls  # type: ignore[method-assign, assignment]
        create = self._client._create_socket
        self._client._create_socket = lambda: BoundedSocket(create(), PACKET_BYTES)  # type: ignore[method-assign, assignment, return-value]

    async def _wait_for(self, fut: Awaitable[T], timeout: float | None) -> T:
        """Wait as aiomqtt does. Cancel: also counts if the result comes at the same time, when `asyncio.wait_for` of Python 3.11
        loses it."""
        task = asyncio.current_task()
        assert task is not None
        before = task.cancelling()
        result: T = await super()._wait_for(fut, timeout)
        if task.cancelling() > before:
            raise asyncio.CancelledError
        return result

    @property
    def skipped(self) -> int:
        return self._bounded.filter.skipped if self._bounded is not None else 0

    async def until_disconnected(self) -> None:
        """Wait for the end of the connection. Raises: MqttError."""
        await asyncio.wait((self._disconnected,))
        raise aiomqtt.MqttError("the connection ended") from self._disconnected.exception()

    def abandon(self) -> None:
        """Close the socket without a word, in whatever state the connection is. Idempotent."""
        self._abandoned = True
        if self._resume is not None:
            self._resume.cancel()
        if self._misc_task is not None:
            self._misc_task.cancel()
        if (bounded := self._bounded) is not None and (number := bounded.fileno()) >= 0:
            self._loop.remove_reader(number)
            self._loop.remove_writer(number)
            bounded.close()
        if self._disconnected.done() and not self._disconnected.cancelled():
            self._disconnected.exception()  # it is known already: asyncio need not report it

    def _begin_tls(self, raw: Any) -> Any:
        """Do the handshake on a connected socket, which paho's own method does not close if that fails. Checks the host name."""
        context = self._client._ssl_context
        assert context is not None
        context.check_hostname = True
        secured = context.wrap_socket(raw, server_hostname=self._hostname, do_handshake_on_connect=False)
        try:
            secured.settimeout(CONNECT_S)
            secured.do_handshake()
        except BaseException:
            secured.close()
            raise
        return secured

    def _on_message(self, client: paho.Client, userdata: Any, message: paho.MQTTMessage) -> None:
        # aiomqtt's queue and iterator make two tasks for each message.
        self._handle(message.topic, bytes(message.payload))

    def _on_socket_open(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        # Called in a thread of the executor.
        self._loop.call_soon_threadsafe(self._opened, sock)

    def _opened(self, sock: BoundedSocket) -> None:
        if self._abandoned:  # the attempt was cancelled while the thread connected
            sock.close()
            return
        self._bounded = sock
        self._loop.add_reader(sock.fileno(), self._read)
        self._misc_task = self._loop.create_task(self._misc_loop())

    def _on_socket_close(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        if self._resume is not None:
            self._resume.cancel()
        super()._on_socket_close(client, userdata, sock)

    def _read(self) -> None:
        """Read the packets that are there, a few at a time and within the budget."""
        sock = self._bounded
        if sock is None or self._abandoned:
            return
        for _ in range(_AT_A_TIME):
            now = self._loop.time()
            if not self._budget.take(now):
                return self._pause(sock, max(_PAUSE_S, self._budget.wait_s(now)))
            try:
                self._client.loop_read()
            except Exception as error:  # paho lets through what a broken packet causes
                if not self._disconnected.done():
                    self._disconnected.set_exception(aiomqtt.MqttError(f"a packet of the broker can't be read: {error!r}"))
                return None
            if self._client.socket() is None:
                return None
            if not sock.waiting and not sock.pending():
                return None
        return self._pause(sock, 0.0)

    def _pause(self, sock: BoundedSocket, seconds: float) -> None:
        """Read no more for a while. The system then stops the broker, once its buffers are full."""
        self._loop.remove_reader(sock.fileno())
        self._resume = self._loop.call_later(seconds, self._go_on, sock)

    def _go_on(self, sock: BoundedSocket) -> None:
        if self._client.socket() is not None and not self._abandoned:
            self._loop.add_reader(sock.fileno(), self._read)
            self._read()


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, PeerLost):
        return error.message
    return str(error) or type(error).__name__
