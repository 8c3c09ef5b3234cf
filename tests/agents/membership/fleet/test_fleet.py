"""Fleets at real brokers: mosquitto as a process, amqtt in this process."""

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiomqtt
import pytest

from in_process.peers import until
from meshd.agents.membership.fleet import broker as brokers
from meshd.agents.membership.fleet import fleet as fleets
from meshd.agents.membership.fleet.believed import SILENT_S
from meshd.agents.membership.fleet.fleet import Fleet, FleetSettings, FleetView
from meshd.agents.membership.sources import DuplicateIdentity, PeerFound, PeerWithdrawn, Sighting, SourceNotice
from meshd.agents.observe.events import SessionChanged
from meshd.agents.observe.stream import EventStream
from meshd.clock import Clock, SystemClock
from meshd.protocol.identity import ClusterKey, Identity, load_identity
from meshd.state import StateFolder
from meshd.types import PeerId
from meshd.values import parse_broker
from mqtt.amqtt_broker import amqtt_broker
from mqtt.mosquitto import MISSING, PROGRAM, Mosquitto

MakeIdentity = Callable[[str], Identity]
needs_mosquitto = pytest.mark.skipif(PROGRAM is None, reason=MISSING)


class LaterClock(SystemClock):
    """A monotonic clock that a test sets ahead; sleeps are real."""

    ahead_s = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead_s


class Member:
    """A fleet's part of one peer, with what it reports."""

    def __init__(self, identity: Identity, url: str, clock: Clock | None = None, **settings: Any) -> None:
        self.identity = identity
        self.belongs: set[PeerId] = set()
        self.sightings: list[Sighting] = []
        self.unreached: dict[PeerId, str] = {}
        self.events = EventStream(identity.peer, identity.peer[:4], SystemClock())
        view = FleetView(
            name=identity.peer[:4],
            port=6375,
            protocol="3.1",
            version="1",
            addresses=lambda: ["10.0.0.7"],
            load=lambda: 1,
            linked=list,
            unreached=lambda: self.unreached,
            belongs=lambda peer: peer in self.belongs,
            tokens=lambda: 0,
        )
        chosen = FleetSettings(url=parse_broker(url), **{"telemetry_s": 0.2, **settings})
        self.fleet = Fleet(chosen, lambda: self.identity, view, self.events, self.sightings.append, clock or SystemClock())

    def of(self, kind: type[Sighting], peer: PeerId | None = None) -> list[Any]:
        return [each for each in self.sightings if isinstance(each, kind) and peer in (None, getattr(each, "peer", None))]

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Member"]:
        task = asyncio.create_task(self.fleet.run())
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def make_password_file(path: Path, user: str, password: str) -> None:
    path.touch()
    subprocess.run(["mosquitto_passwd", "-b", str(path), user, password], check=True)


async def retained(url: str, pattern: str, seconds: float = 0.5) -> dict[str, bytes]:
    broker, found = parse_broker(url), {}
    async with aiomqtt.Client(broker.host, broker.port) as client:
        await client.subscribe(pattern)
        try:
            async with asyncio.timeout(seconds):
                async for message in client.messages:
                    assert isinstance(message.payload, bytes)
                    if message.topic.matches(pattern):  # amqtt sends all retained messages to a new subscriber
                        found[message.topic.value] = message.payload
        except TimeoutError:
            pass
    return found


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have fleets look at their state, and publish changes of it, ten times as often."""
    monkeypatch.setattr(fleets, "_CHECK_S", 0.1)
    monkeypatch.setattr(fleets, "_URGENT_S", 0.3)


@pytest.fixture(params=["mosquitto", "amqtt"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    if request.param == "amqtt":
        async with amqtt_broker() as url:
            yield url
    elif PROGRAM is None:
        pytest.skip(MISSING)
    else:
        with Mosquitto(tmp_path) as broker:
            yield broker.url


async def test_peers_find_one_another_whoever_comes_first_and_say_when_they_leave(url: str, make_identity: MakeIdentity) -> None:
    one, two = Member(make_identity("one"), url), Member(make_identity("two"), url)
    async with one.running():
        await until(lambda: one.fleet.broker.up)
        async with two.running():
            await until(lambda: two.of(PeerFound, one.identity.peer) and one.of(PeerFound, two.identity.peer))
            found = one.of(PeerFound, two.identity.peer)[0]
            assert (found.source, found.addresses, found.port, found.load) == ("mqtt", ("10.0.0.7",), 6375, 1)
            assert found.cluster == one.identity.fingerprint
        await until(lambda: one.of(PeerWithdrawn, two.identity.peer))
    assert await retained(url, "meshd/#") == {}
    assert not one.of(DuplicateIdentity)


@pytest.mark.parametrize("url", ["mosquitto"], indirect=True)
async def test_a_fleet_follows_a_rotation(
    url: str, make_identity: MakeIdentity, rotated: Identity, next_key: ClusterKey, tmp_path: Path
) -> None:
    """A peer that stays is believed with its old and its new certificate, a new one with its own; an excluded one no longer."""
    one, stays, out = (Member(make_identity(name), url) for name in ("one", "stays", "out"))
    new = Member(load_identity(StateFolder.open(tmp_path / "new"), next_key, os.urandom), url)
    one.belongs = stays.belongs = new.belongs = {one.identity.peer, stays.identity.peer}
    async with one.running(), stays.running(), out.running():
        await until(lambda: one.of(PeerFound, stays.identity.peer) and one.of(PeerFound, out.identity.peer))
        one.identity = rotated
        await until(lambda: one.of(PeerWithdrawn, out.identity.peer))
        assert not one.of(PeerWithdrawn, stays.identity.peer)
        one.sightings.clear()
        async with new.running():
            await until(lambda: one.of(PeerFound, new.identity.peer) and new.of(PeerFound, one.identity.peer))
            await until(lambda: stays.of(PeerFound, one.identity.peer))
            out.unreached[one.identity.peer] = "excluded"  # has it publish its presence again
            stays.unreached[one.identity.peer] = "another key"
            await until(lambda: one.of(PeerFound, stays.identity.peer))
            await until(lambda: one.fleet.believed.refused["forged"])
            assert not one.of(PeerFound, out.identity.peer)
            assert not new.of(PeerFound, out.identity.peer)


async def test_sensors_appear_with_a_peer_and_go_with_it(url: str, make_identity: MakeIdentity) -> None:
    member = Member(make_identity("one"), url, home_assistant="homeassistant")
    telemetry = member.fleet.topics.telemetry(member.identity.peer)
    async with member.running():
        await until(lambda: member.fleet.broker.up)
        await asyncio.sleep(0.5)
        ((topic, payload),) = (await retained(url, "homeassistant/#")).items()
        assert topic.startswith("homeassistant/device/meshd_")
        assert json.loads(payload)["state_topic"] == telemetry
        measured = json.loads((await retained(url, telemetry))[telemetry])
        assert set(json.loads(payload)["components"]) == measured.keys() - {"at"}
    assert await retained(url, "homeassistant/#") == {}


async def test_events_are_published(url: str, make_identity: MakeIdentity) -> None:
    member = Member(make_identity("one"), url)
    async with member.running():
        await until(lambda: member.events.readers == 1)
        reading = asyncio.create_task(retained(url, "meshd/1/+/peer/+/event/#", 2.0))
        await asyncio.sleep(0.5)
        member.events.publish(SessionChanged(session="5" * 32, model="m", state="decode", was="", tokens=3, reason="hush"))
        ((topic, payload),) = (await reading).items()
    assert topic.endswith("/event/session")
    assert json.loads(payload)["tokens"] == 3
    assert b"hush" not in payload


async def test_telemetry_can_be_off(url: str, make_identity: MakeIdentity) -> None:
    member = Member(make_identity("one"), url, home_assistant="homeassistant", telemetry_s=0)
    async with member.running():
        await until(lambda: member.fleet.broker.up)
        seen = await retained(url, "#", 1.0)
    assert [topic for topic in seen if not topic.startswith("$SYS")] == [member.fleet.topics.presence(member.identity.peer)]


@pytest.mark.parametrize("url", ["mosquitto"], indirect=True)
async def test_peers_that_neither_can_dial_are_named(url: str, make_identity: MakeIdentity) -> None:
    one, two = Member(make_identity("one"), url), Member(make_identity("two"), url)
    async with one.running(), two.running():
        await until(lambda: one.of(PeerFound, two.identity.peer) and two.of(PeerFound, one.identity.peer))
        one.unreached[two.identity.peer] = "timed out"
        await until(lambda: one.identity.peer in {known.peer for known in two.fleet.believed.present() if known.unreached})
        await asyncio.sleep(0.3)
        assert not [notice for notice in one.of(SourceNotice) if "neither" in notice.message]
        two.unreached[one.identity.peer] = "no route to host"
        await until(lambda: any("neither" in notice.message for notice in one.of(SourceNotice)))
        notice = next(notice for notice in one.of(SourceNotice) if "neither" in notice.message)
        assert "timed out" in notice.message
        assert "6375" in notice.hint
        one.unreached.clear()
        await until(lambda: one.of(SourceNotice)[-1] == SourceNotice(source="mqtt", message="", about=notice.about))


async def test_a_copied_identity_is_reported(url: str, make_identity: MakeIdentity) -> None:
    identity = make_identity("one")
    one, copy = Member(identity, url), Member(identity, url)
    async with one.running():
        await until(lambda: one.fleet.broker.up)
        # A copy has the same client id, so the broker lets only one of both be connected at a time.
        async with copy.running():
            await until(lambda: one.of(DuplicateIdentity) or copy.of(DuplicateIdentity))


@needs_mosquitto
async def test_a_broker_that_crashes_is_found_again_and_no_peer_is_withdrawn(tmp_path: Path, make_identity: MakeIdentity) -> None:
    with Mosquitto(tmp_path) as broker:
        one, two = Member(make_identity("one"), broker.url), Member(make_identity("two"), broker.url)
        async with one.running(), two.running():
            await until(lambda: one.of(PeerFound, two.identity.peer) and two.of(PeerFound, one.identity.peer))
            await asyncio.to_thread(broker.kill)
            await until(lambda: not one.fleet.broker.up and not two.fleet.broker.up)
            await until(lambda: any("no connection to the MQTT broker" in notice.message for notice in one.of(SourceNotice)))
            seen = len(one.of(PeerFound, two.identity.peer))
            await asyncio.to_thread(broker.start)
            await until(lambda: len(one.of(PeerFound, two.identity.peer)) > seen)
            assert one.of(SourceNotice)[-1].message == ""
            assert not one.of(PeerWithdrawn)


@needs_mosquitto
async def test_a_peer_that_vanishes_is_withdrawn_by_its_last_will(tmp_path: Path, make_identity: MakeIdentity) -> None:
    with Mosquitto(tmp_path) as broker:
        one, two = Member(make_identity("one"), broker.url), Member(make_identity("two"), broker.url)
        async with one.running(), two.running():
            await until(lambda: one.of(PeerFound, two.identity.peer))
            assert two.fleet.broker._client is not None
            two.fleet.broker._client.abandon()
            await until(lambda: one.of(PeerWithdrawn, two.identity.peer))


@needs_mosquitto
async def test_a_peer_whose_last_will_was_lost_is_withdrawn_when_it_has_been_silent(
    tmp_path: Path, make_identity: MakeIdentity
) -> None:
    clock = LaterClock()
    with Mosquitto(tmp_path) as broker:
        one, two = Member(make_identity("one"), broker.url, clock), Member(make_identity("two"), broker.url)
        async with one.running():
            async with two.running():
                await until(lambda: one.of(PeerFound, two.identity.peer))
                await asyncio.to_thread(broker.kill)
            await asyncio.to_thread(broker.start)
            await until(lambda: one.fleet.broker.up)
            clock.ahead_s = SILENT_S + 1
            await until(lambda: one.of(PeerWithdrawn, two.identity.peer))
            assert [known.peer for known in one.fleet.believed.present()] in ([], [one.identity.peer])


@needs_mosquitto
@pytest.mark.parametrize("right", [True, False])
async def test_user_and_password_are_checked_and_never_shown(tmp_path: Path, make_identity: MakeIdentity, *, right: bool) -> None:
    lines = ("allow_anonymous false", f"password_file {tmp_path / 'passwords'}")
    make_password_file(tmp_path / "passwords", "me", "a-secret")
    with Mosquitto(tmp_path, lines=lines) as broker:
        url = broker.url.replace("mqtt://", f"mqtt://me:{'a-secret' if right else 'wrong-secret'}@")
        member = Member(make_identity("one"), url)
        async with member.running():
            await until(lambda: member.of(SourceNotice))
            assert member.fleet.broker.up == right
            assert "secret" not in repr(member.sightings)
            assert "secret" not in repr(member.fleet.about())


async def test_a_broker_that_says_nothing_or_nonsense_does_no_harm(
    make_identity: MakeIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brokers, "CONNECT_S", 1.0)

    async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\x20\x02\x00\x00" + b"\xff" * 100_000)
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.close()

    server = await asyncio.start_server(nonsense, "127.0.0.1", 0)
    member = Member(make_identity("one"), f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    async with member.running():
        await until(lambda: member.of(SourceNotice))
        await asyncio.sleep(1)
    server.close()
    assert not member.of(PeerFound)
