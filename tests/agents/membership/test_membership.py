"""Membership over real links: sightings, adverts, gossip and notices."""

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from in_process.clusters import make_card, make_holding
from in_process.peer_events import CAPABILITY
from in_process.peers import KEY, QUICK, until
from meshd.agents.links import dial
from meshd.agents.links.link_table import STOPS
from meshd.agents.links.links import Links, LinkSettings
from meshd.agents.links.probe import LinkProber
from meshd.agents.membership.adverts.encoding import EncodedProfile, hash_of
from meshd.agents.membership.adverts.publisher import SelfDescription
from meshd.agents.membership.membership import Membership
from meshd.agents.membership.peer_events import PeerState
from meshd.agents.membership.sources import DuplicateIdentity, OtherClusters, PeerFound, SourceNotice
from meshd.agents.observe.stream import EventStream
from meshd.clock import SystemClock
from meshd.protocol.identity import ClusterKey, load_identity
from meshd.protocol.messages import PROTOCOL_VERSION, FetchProfile, PeerStatus, ProfileData
from meshd.state import StateFolder
from meshd.types import Advert, DeviceStatus, Holding, LearnedRates, ModelCard, ModelId, PeerId, Profile, Status
from meshd.values import Address

STRANGER = PeerId("c" * 52)
CARD = make_card(30)
_LETTERS = str.maketrans("0123456789", "bcdefghijk")


class Member:
    """A peer with links and membership, which records what the membership reports."""

    def __init__(self, folder: Path, name: str, key: ClusterKey = KEY) -> None:
        self.sessions = 0
        self.free_bytes = 4
        self.models: tuple[ModelCard, ...] = ()
        self.holdings: tuple[Holding, ...] = ()
        self.adverts: list[Advert] = []
        self.gone: list[PeerId] = []
        clock = SystemClock()
        self.links = Links(
            load_identity(StateFolder.open(folder / name), key, os.urandom),
            name,
            1,
            LinkSettings(host="127.0.0.1", port=0, timing=QUICK),
            clock,
            on_up=lambda *link: self.membership.on_up(*link),
            on_down=lambda *link: self.membership.on_down(*link),
            on_outcome=lambda outcome: self.membership.on_dialled(outcome),
        )
        self.membership = Membership(
            description=SelfDescription(
                peer=self.links.id,
                name=name,
                incarnation=1,
                version="0.1.0",
                capability=CAPABILITY,
                memory_free_bytes=lambda: self.free_bytes,
                holdings=lambda: self.holdings,
                models=lambda: self.models,
                learned=LearnedRates,
                sessions=lambda: self.sessions,
                draining=bool,
                device=DeviceStatus,
            ),
            links=self.links,
            prober=LinkProber(self.links, clock, lambda: None),
            clock=clock,
            events=EventStream(self.links.id, name, clock),
            on_advert=self.adverts.append,
            on_gone=lambda peer, reason: self.gone.append(peer),
        )
        self.membership.register()
        self.port = self.links.bind()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Member"]:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.links.run())
            membership = group.create_task(self.membership.run([]))
            yield self
            membership.cancel()
            await self.links.close("the test is over")

    def bytes_out(self) -> int:
        return sum(row["bytes_out"] for row in self.links.rows())

    def hears_of(self, other: "Member") -> None:
        self.membership.on_sighting(
            PeerFound(source="mdns", peer=other.links.id, addresses=("127.0.0.1",), port=other.port, name="a hint")
        )

    def state_of(self, other: "Member") -> PeerState:
        known = self.membership.table.get(other.links.id)
        return known.state if known is not None else PeerState.UNKNOWN


@pytest.fixture
async def members(tmp_path: Path) -> AsyncIterator[list[Member]]:
    """Three running members that do not know one another."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(Member(tmp_path, name).running()) for name in ("ann", "bob", "cat")]


async def test_a_sighting_becomes_a_link_and_both_exchange_adverts(members: list[Member]) -> None:
    ann, bob, _ = members
    ann.hears_of(bob)
    assert (ann.state_of(bob), bob.state_of(ann)) == (PeerState.FOUND, PeerState.UNKNOWN)
    await until(lambda: bool(ann.adverts and bob.adverts))
    assert (ann.state_of(bob), bob.state_of(ann)) == (PeerState.ALIVE, PeerState.ALIVE)
    assert [advert.name for advert in ann.membership.adverts()] == ["ann", "bob"]
    assert ann.membership.name_of(bob.links.id) == "bob"
    assert ann.membership.name_of(STRANGER) == "cccccccc"


async def test_a_change_is_sent_to_all_at_once(members: list[Member]) -> None:
    ann, bob, _ = members
    ann.hears_of(bob)
    await until(lambda: bool(bob.adverts))
    ann.sessions = 3
    ann.membership.changed()
    await until(lambda: bob.adverts[-1].sessions == 3)
    assert bob.adverts[-1].revision > bob.adverts[0].revision


async def test_readers_of_events_hear_of_changes_of_state_and_not_of_each_status(members: list[Member]) -> None:
    ann, bob, _ = members
    events = ann.membership.events
    start = events.last
    ann.hears_of(bob)
    await until(lambda: bool(ann.adverts))
    for sessions in (1, 2):
        bob.sessions = sessions
        bob.membership.changed()
        await until(lambda sessions=sessions: ann.adverts[-1].sessions == sessions)
    told = [json.loads(event.line) for event in events.since(start)[1] if event.kind == "peer"]
    states = ["", *(event["state"] for event in told)]
    assert [event["was"] for event in told] == states[:-1]
    assert states[-1] == "alive"
    assert len(set(states)) == len(states)


async def test_a_peer_learns_of_others_from_adverts_and_dials_them(members: list[Member]) -> None:
    ann, bob, cat = members
    bob.hears_of(cat)
    await until(lambda: bob.state_of(cat) is PeerState.ALIVE)
    ann.hears_of(bob)
    bob.membership.changed()
    await until(lambda: ann.state_of(cat) is PeerState.ALIVE)


async def test_a_peer_that_closes_its_links_has_left_and_is_reported_as_gone(members: list[Member]) -> None:
    ann, bob, _ = members
    ann.hears_of(bob)
    await until(lambda: ann.state_of(bob) is bob.state_of(ann) is PeerState.ALIVE)  # they learn of it at different times
    await bob.links.close(STOPS)
    await until(lambda: ann.state_of(bob) is PeerState.LEFT)
    assert ann.gone == [bob.links.id]
    (row,) = ann.membership.rows()
    assert (row["state"], row["why"]) == ("left", "it left: this peer stops")
    assert bob.state_of(ann) is PeerState.ALIVE  # that bob stops says nothing about ann


async def test_a_peer_can_only_speak_of_itself(members: list[Member]) -> None:
    """A status and a profile have no field for the peer they are of: it is the sender."""
    ann, bob, cat = members
    ann.hears_of(bob)
    ann.hears_of(cat)
    await until(lambda: len(ann.membership.adverts()) == 3)
    cat.sessions, bob.sessions = 2, 9
    cat.membership.changed()
    bob.membership.changed()
    await until(lambda: {advert.sessions for advert in ann.membership.adverts()} == {0, 2, 9})
    known = {advert.name: advert.sessions for advert in ann.membership.adverts()}
    assert known == {"ann": 0, "bob": 9, "cat": 2}
    for message in (PeerStatus, FetchProfile, ProfileData, Status, Profile):
        assert "peer" not in {field.name for field in msgspec.structs.fields(message)}


def models_on_disk(count: int) -> tuple[ModelCard, ...]:
    return tuple(msgspec.structs.replace(CARD, id=ModelId(f"{number:032x}"), name=f"model {number}") for number in range(count))


async def test_a_peer_with_300_models_on_disk_is_known_whole_and_a_change_of_kv_sends_no_card_again(members: list[Member]) -> None:
    ann, bob, _ = members
    bob.models = models_on_disk(300)
    ann.hears_of(bob)
    await until(lambda: bool(ann.adverts))
    assert ann.adverts[-1].models == bob.models
    before = bob.bytes_out()
    for sessions in range(1, 11):
        bob.sessions = sessions
        bob.membership.changed()
        await until(lambda: ann.adverts[-1].sessions == bob.sessions)
    assert bob.bytes_out() - before < 10_000


async def test_a_model_that_was_pulled_is_known_to_the_others(members: list[Member]) -> None:
    ann, bob, _ = members
    ann.hears_of(bob)
    await until(lambda: bool(ann.adverts))
    bob.models = models_on_disk(1)
    bob.membership.changed()
    await until(lambda: ann.adverts[-1].models == bob.models)


async def test_models_that_do_not_fit_in_a_profile_are_left_out_with_a_notice(members: list[Member]) -> None:
    ann, bob, _ = members
    bob.models = models_on_disk(2000)
    ann.hears_of(bob)
    await until(lambda: bool(ann.adverts))
    (notice,) = bob.membership.notices.items()
    assert f"{2000 - len(ann.adverts[-1].models)} of the 2000 models on this device are not announced" in notice[0]
    assert "meshd rm" in notice[1]
    bob.models = models_on_disk(3)
    bob.membership.changed()
    await until(lambda: not bob.membership.notices.items())


async def test_a_status_that_no_message_can_hold_is_reported(members: list[Member]) -> None:
    ann, bob, _ = members
    ann.hears_of(bob)
    await until(lambda: bool(ann.adverts))
    bob.holdings = tuple(make_holding(layer, layer + 1) for layer in range(1000))
    bob.membership.changed()
    await until(lambda: bool(bob.membership.notices.items()))
    assert "other peers do not learn what this peer does" in bob.membership.notices.items()[0][0]
    assert ann.state_of(bob) is PeerState.ALIVE


async def test_a_profile_that_is_malformed_is_reported_and_not_fetched_again(members: list[Member]) -> None:
    ann, bob, _ = members
    asked: list[int] = []

    def answer(sender: PeerId, message: FetchProfile, payload: memoryview) -> tuple[ProfileData, bytes]:
        asked.append(message.request)
        return ProfileData(request=message.request), b"no profile"

    bob.links._dispatcher._handlers[FetchProfile] = answer
    bob.membership.publisher._encoded = (bob.membership.publisher._profile(), EncodedProfile(b"", hash_of(b"no profile"), 0))
    ann.hears_of(bob)
    await until(lambda: bool(ann.membership.notices.items()))
    assert "bob" in ann.membership.notices.items()[0][0]
    for _ in range(3):
        bob.membership.changed()
        await asyncio.sleep(0.1)
    assert len(asked) == 1
    assert [advert.name for advert in ann.membership.adverts()] == ["ann"]


async def test_a_member_that_invents_neighbours_causes_few_hints_and_no_line_of_log(
    members: list[Member], caplog: pytest.LogCaptureFixture
) -> None:
    ann, bob, _ = members
    ann.hears_of(bob)
    await until(lambda: bool(ann.adverts))
    caplog.set_level(logging.INFO)
    for revision in range(100, 400):
        names = [PeerId(f"{revision}{number}".translate(_LETTERS).ljust(52, "a")) for number in range(64)]
        hints = {name: f"127.0.0.2:{number + 1}" for number, name in enumerate(names)}
        status = Status(revision=revision, profile="0" * 32, memory_free_bytes=1, neighbours=hints)
        bob.links.send(ann.links.id, PeerStatus(status=status))
    await until(lambda: ann.adverts[-1].revision == 399)
    assert len(ann.membership.table) < 80
    assert [record for record in caplog.records if record.levelno >= logging.INFO] == []


async def test_an_address_of_the_user_where_nobody_answers_is_not_reached_for_a_reason(
    members: list[Member], caplog: pytest.LogCaptureFixture, unused_tcp_port: int
) -> None:
    ann, _, _ = members
    for host, port in (("nosuch.invalid", 6375), ("127.0.0.1", unused_tcp_port)):
        ann.membership.on_sighting(PeerFound(source="static", peer=None, addresses=(host,), port=port))
    await until(lambda: [row["state"] for row in ann.membership.rows()] == ["not reached", "not reached"])
    why = {row["name"]: row["why"] for row in ann.membership.rows()}
    assert "nosuch.invalid is not known" in why["nosuch.invalid:6375"]
    assert "Connection refused" in why[f"127.0.0.1:{unused_tcp_port}"]
    assert all(name in caplog.text for name in why)


def _published(member: Member) -> list[dict[str, Any]]:
    """Return the events about peers so far."""
    _, events = member.membership.events.since(0)
    return [each for event in events if (each := msgspec.json.decode(event.line))["type"] == "peer"]


async def test_every_failed_state_comes_as_an_event(members: list[Member], unused_tcp_port: int, tmp_path: Path) -> None:
    ann, _, _ = members
    for event in (
        PeerFound(source="mdns", peer=STRANGER, addresses=("127.0.0.1",), port=unused_tcp_port, name="gone"),
        PeerFound(source="static", peer=None, addresses=("127.0.0.2",), port=unused_tcp_port),
        OtherClusters(source="mdns", peers={"b" * 16: 1}, addresses={"b" * 16: Address("10.0.0.9", 6375)}),
    ):
        ann.membership.on_sighting(event)
    stranger = Member(tmp_path, "stranger", ClusterKey(b"x" * 32))
    async with stranger.running():
        ann.membership.on_sighting(PeerFound(source="static", peer=None, addresses=("127.0.0.1",), port=stranger.port))
        await until(lambda: sum(bool(row["trouble"]) for row in ann.membership.rows()) == 4)
    events = {each["of_name"]: each for each in _published(ann)}
    assert (events["gone"]["state"], events["gone"]["was"]) == ("not reached", "found")
    assert "Connection refused" in events["gone"]["reason"]
    assert events[f"127.0.0.2:{unused_tcp_port}"]["state"] == "not reached"
    assert events[f"127.0.0.1:{stranger.port}"]["state"] == "refused"
    assert events["b" * 16]["state"] == "other cluster"
    ann.membership.on_sighting(OtherClusters(source="mdns", peers={}))
    assert [row["name"] for row in ann.membership.rows() if row["trouble"] == "other cluster"] == []
    assert _published(ann)[-1]["state"] == "forgotten"


async def test_a_peer_whose_clock_is_wrong_is_alive_with_a_trouble(members: list[Member], monkeypatch: pytest.MonkeyPatch) -> None:
    ann, bob, _ = members
    late = SystemClock()
    monkeypatch.setattr(late, "wall", lambda: time.time() - 7200)
    bob.membership.publisher.clock = late
    ann.hears_of(bob)
    await until(lambda: [row["trouble"] for row in ann.membership.rows()] == ["clock"])
    (row,) = ann.membership.rows()
    assert (row["state"], row["why"]) == ("alive", "its clock is 2 h behind this device's")
    assert row["clock_ahead_s"] == pytest.approx(-7200, abs=5)
    assert _published(ann)[-1]["reason"] == row["why"]
    bob.membership.publisher.clock = SystemClock()
    bob.membership.changed()
    await until(lambda: [row["trouble"] for row in ann.membership.rows()] == [""])
    assert _published(ann)[-1]["reason"] == ""


async def test_a_peer_of_another_version_is_one_row_and_one_notice_until_it_has_gone(
    members: list[Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, _, _ = members
    newer = Member(tmp_path, "newer")
    greeting = newer.links._opener.greeting
    newer.links._opener.greeting = msgspec.structs.replace(greeting, version=(PROTOCOL_VERSION[0] + 1, 0), software="meshd/9")
    async with newer.running():
        ann.hears_of(newer)
        newer.hears_of(ann)
        await until(lambda: ann.state_of(newer) is PeerState.REFUSED)
        ann.links.connect("127.0.0.2", newer.port, "static")
        await asyncio.sleep(0.3)
        (row,) = ann.membership.rows()
        assert (row["peer"], row["name"], row["state"]) == (newer.links.id, "newer", "refused")
        assert f"protocol {PROTOCOL_VERSION[0] + 1}.0 (meshd/9)" in row["why"]
        assert {known["port"] for known in row["addresses"]} == {newer.port}
        ((message, hint),) = ann.membership.notices.items()
        assert "speaks protocol" in message
        assert "same version" in hint
    monkeypatch.setattr(dial, "_REFUSED_S", 0.0)
    ann.links._dialler._targets["127.0.0.1", newer.port].wake.set()
    await until(lambda: ann.state_of(newer) is PeerState.UNREACHED)
    assert ann.membership.notices.items() == []


async def test_a_stranger_at_the_address_of_a_peer_does_not_make_it_refused(members: list[Member], tmp_path: Path) -> None:
    """Anyone on the LAN can announce a peer's id with an address of another device."""
    ann, bob, _ = members
    stranger = Member(tmp_path, "stranger", ClusterKey(b"x" * 32))
    async with stranger.running():
        forged = PeerFound(source="mdns", peer=bob.links.id, addresses=("127.0.0.1",), port=stranger.port)
        ann.membership.on_sighting(forged)
        await until(lambda: ann.state_of(bob) is PeerState.UNREACHED)
        ann.hears_of(bob)
        await until(lambda: ann.state_of(bob) is PeerState.ALIVE)


async def test_a_stranger_that_dials_is_a_row_until_its_own_row_says_what_is_wrong(members: list[Member], tmp_path: Path) -> None:
    ann, _, _ = members
    stranger = Member(tmp_path, "stranger", ClusterKey(b"x" * 32))
    async with stranger.running():
        stranger.hears_of(ann)
        await until(lambda: [(row["name"], row["trouble"]) for row in ann.membership.rows()] == [("127.0.0.1", "refused")])
        ann.hears_of(stranger)
        await until(lambda: [row["peer"] for row in ann.membership.rows() if row["trouble"]] == [stranger.links.id])


async def test_another_cluster_on_the_network_is_shown_with_the_command_that_joins_it(members: list[Member]) -> None:
    membership = members[0].membership
    membership.on_sighting(OtherClusters(source="mdns", peers={"a" * 16: 2}))
    ((message, hint),) = membership.notices.items()
    assert message == f"another cluster is on this network: {'a' * 16}"
    assert "meshd key join CODE --replace" in hint
    membership.on_sighting(OtherClusters(source="mdns", peers={"a" * 16: 2, "b" * 16: 1}))
    ((message, _),) = membership.notices.items()
    assert message == f"other clusters are on this network: {'a' * 16}, {'b' * 16}"
    membership.on_sighting(OtherClusters(source="mdns", peers={}))
    assert membership.notices.items() == []


async def test_a_repeated_notice_is_kept_once_and_notices_are_bounded(members: list[Member]) -> None:
    membership = members[0].membership
    membership.on_sighting(SourceNotice(source="mdns", message="no network", hint="connect one"))
    membership.on_sighting(DuplicateIdentity(source="mdns", peer=STRANGER, addresses=("10.0.0.7",), port=1))
    membership.on_sighting(SourceNotice(source="mdns", message="no network", hint="connect one"))
    assert [hint for _, hint in membership.notices.items()] == [
        "remove identity.key from the copy and start it again",
        "connect one",
    ]
    for number in range(30):
        membership.notice(f"notice {number}")
    assert [message for message, _ in membership.notices.items()] == [f"notice {number}" for number in range(10, 30)]
