"""The connection to a real mosquitto: what is read is bounded, and what is published arrives, also over a restart."""

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiomqtt
import pytest

from in_process.peers import until
from meshd.agents.membership.fleet.broker import Broker, BrokerSettings, _BoundedClient
from meshd.agents.membership.fleet.topics import PACKET_BYTES
from meshd.clock import SystemClock
from meshd.errors import PeerLost
from meshd.values import parse_broker
from mqtt.mosquitto import MISSING, PROGRAM, Mosquitto, free_port

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=MISSING)


class User:
    """Uses a connection, and keeps what it hears."""

    def __init__(self, url: str, ca_file: str = "") -> None:
        self.heard: list[tuple[str, int]] = []
        self.troubles: list[str] = []
        self.lost = asyncio.Event()
        settings = BrokerSettings(parse_broker(url), ca_file, "user", ("t/#",))
        self.broker = Broker(settings, self, SystemClock())

    def will(self) -> tuple[str, bytes]:
        return "t/will", b"gone"

    def on_message(self, topic: str, payload: bytes) -> None:
        self.heard.append((topic, len(payload)))

    async def connected(self) -> None:
        await self.lost.wait()
        raise PeerLost("the connection is lost")

    def farewell(self) -> Sequence[tuple[str, bytes, bool]]:
        return [("t/will", b"left", True)]

    def on_trouble(self, reason: str) -> None:
        self.troubles.append(reason)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.broker.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_a_long_message_is_skipped_and_those_around_it_are_heard(tmp_path: Path) -> None:
    with Mosquitto(tmp_path) as broker:
        user = User(broker.url)
        async with user.running():
            await until(lambda: user.broker.up)
            for size in (10, PACKET_BYTES + 1, 1 << 20, 20, PACKET_BYTES - 100):
                await user.broker.publish("t/x", bytes(size))
            await until(lambda: len(user.heard) == 3)
            assert [size for _, size in user.heard] == [10, 20, PACKET_BYTES - 100]
            assert user.broker.skipped == 2
            assert user.troubles == [""]


async def test_a_retained_long_message_does_not_keep_a_peer_out(tmp_path: Path) -> None:
    with Mosquitto(tmp_path) as broker:
        async with aiomqtt.Client(broker.host, broker.port) as client:
            await client.publish("t/long", bytes(1 << 20), retain=True, qos=1)
            await client.publish("t/short", b"x", retain=True, qos=1)
        user = User(broker.url)
        async with user.running():
            await until(lambda: user.heard)
            assert user.heard == [("t/short", 1)]
            assert user.broker.up


async def test_a_message_waits_for_a_broker_that_restarts(tmp_path: Path) -> None:
    with Mosquitto(tmp_path) as broker:
        user = User(broker.url)
        async with user.running():
            await until(lambda: user.broker.up)
            await asyncio.to_thread(broker.kill)
            await until(lambda: not user.broker.up)
            with pytest.raises(PeerLost):
                await user.broker.publish("t/x", b"lost")
            waiting = asyncio.create_task(user.broker.publish_in(30, "t/x", b"kept"))
            await asyncio.to_thread(broker.start)
            await waiting
            await until(lambda: ("t/x", 4) in user.heard)
            assert user.troubles[0] == user.troubles[-1] == ""
            assert all(user.troubles[1:-1])


async def test_a_message_that_no_broker_takes_is_given_up() -> None:
    user = User(f"mqtt://127.0.0.1:{free_port()}")
    async with user.running():
        with pytest.raises(PeerLost, match="took no message"):
            await user.broker.publish_in(0.5, "t/x", b"x")


async def test_an_orderly_end_takes_the_place_of_the_last_will(tmp_path: Path) -> None:
    with Mosquitto(tmp_path) as broker:
        user = User(broker.url)
        async with user.running():
            await until(lambda: user.broker.up)
        async with aiomqtt.Client(broker.host, broker.port) as client:
            await client.subscribe("t/will")
            async with asyncio.timeout(5):
                message = await anext(aiter(client.messages))
            assert message.payload == b"left"


async def test_an_end_at_the_moment_of_a_fault_is_an_end(tmp_path: Path) -> None:
    with Mosquitto(tmp_path) as broker:
        user = User(broker.url)
        task = asyncio.create_task(user.broker.run())
        await until(lambda: user.broker.up)
        user.lost.set()
        task.cancel()
        ended, _ = await asyncio.wait([task], timeout=5.0)
        if not ended:
            task.cancel()
        assert ended
        assert task.cancelled()


async def test_an_end_is_quick_though_the_broker_is_stuck() -> None:
    with socket.create_server(("127.0.0.1", 0)) as stuck:  # the kernel takes the connection, and nobody answers
        user = User(f"mqtt://127.0.0.1:{stuck.getsockname()[1]}")
        async with asyncio.timeout(5), user.running():
            await asyncio.sleep(0.5)


async def test_a_broker_whose_certificate_is_not_trusted_is_refused(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    lines = ("allow_anonymous true", f"certfile {certificate}", f"keyfile {key}")
    with Mosquitto(tmp_path, lines=lines) as broker:
        url = broker.url.replace("mqtt://", "mqtts://")
        user = User(url)
        async with user.running():
            await until(lambda: user.troubles)
            assert "certificate" in user.troubles[0].lower()
        misled = User(url.replace("127.0.0.1", "localhost"), str(certificate))
        async with misled.running():
            await until(lambda: misled.troubles)
            assert "localhost" in misled.troubles[0]
        trusting = User(url, str(certificate))
        async with trusting.running():
            await until(lambda: trusting.broker.up)
            await trusting.broker.publish("t/x", bytes(60_000))
            await until(lambda: trusting.heard == [("t/x", 60_000)])


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Make a self-signed certificate for 127.0.0.1, as a PEM file, and its key."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "broker")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(private, hashes.SHA256())
    )
    certificate, key = folder / "broker.crt", folder / "broker.key"
    certificate.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    pem = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key.write_bytes(pem)
    return certificate, key


@pytest.mark.parametrize("rounds", range(4))
async def test_a_cancellation_that_comes_with_an_acknowledgement_is_not_lost(rounds: int) -> None:
    """Without this, a peer that stops in the moment in which the broker takes a message of it never stops."""
    client = _BoundedClient(lambda topic, payload: None, "localhost")
    came = asyncio.Event()
    waiting = asyncio.create_task(client._wait_for(came.wait(), 5.0))
    await asyncio.sleep(0.01)
    came.set()
    for _ in range(rounds):
        await asyncio.sleep(0)
    waiting.cancel()
    if rounds < 3:
        with pytest.raises(asyncio.CancelledError):
            await waiting
    else:
        await waiting  # it had ended before
