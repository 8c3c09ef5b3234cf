"""Real mDNS on loopback. Every test has its own clusters and peers, so that tests may run at the same time."""

import asyncio
import base64
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from zeroconf.asyncio import AsyncZeroconf

from in_process.clocks import SetClock
from meshd.agents.membership.interfaces import Interface, InterfaceKind, present_interfaces
from meshd.agents.membership.mdns import MdnsDiscovery
from meshd.agents.membership.mdns_records import Announcement
from meshd.agents.membership.sources import DuplicateIdentity, OtherClusters, PeerFound, PeerWithdrawn, Sighting, SourceNotice
from meshd.clock import SystemClock
from meshd.types import PeerId

HERE = "127.0.0.1"


class QuickClock(SystemClock):
    """Runs 50 times faster than real time."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / 50)

    def monotonic(self) -> float:
        return super().monotonic() * 50


class Seen:
    """Records the sightings that one discovery reports."""

    def __init__(self) -> None:
        self.sightings: list[Sighting] = []
        self._changed = asyncio.Event()

    def __call__(self, sighting: Sighting) -> None:
        self.sightings.append(sighting)
        self._changed.set()

    async def until(self, wanted: Callable[[Sighting], bool], within_s: float = 3.0) -> Sighting:
        async with asyncio.timeout(within_s):
            while True:
                for sighting in self.sightings:
                    if wanted(sighting):
                        return sighting
                self._changed.clear()
                await self._changed.wait()

    async def found(self, peer: PeerId, within_s: float = 3.0) -> PeerFound:
        sighting = await self.until(lambda each: isinstance(each, PeerFound) and each.peer == peer, within_s)
        assert isinstance(sighting, PeerFound)
        return sighting


def random_letters() -> str:
    return base64.b32encode(os.urandom(35)).decode().lower()[:52]


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(3.0):
        while not condition():  # noqa: ASYNC110  the condition has no event to wait for
            await asyncio.sleep(0.01)


@pytest.fixture
def cluster() -> str:
    return random_letters()[:16]


def announce(cluster: str, name: str = "a", port: int = 7001) -> Announcement:
    return Announcement(peer=PeerId(random_letters()), cluster=cluster, name=name, port=port, protocol="1.0", version="0.1.0")


@asynccontextmanager
async def running(
    announcement: Announcement,
    *,
    clock: SystemClock | None = None,
    scan: Callable[[], list[Interface]] = present_interfaces,
    load: Callable[[], int] = lambda: 0,
) -> AsyncIterator[tuple[MdnsDiscovery, Seen]]:
    seen = Seen()
    mdns = MdnsDiscovery(announcement, seen, clock=clock or SystemClock(), interfaces=[HERE], scan=scan, load=load)
    task = asyncio.create_task(mdns.run())
    try:
        yield mdns, seen
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()


async def test_peers_of_a_cluster_find_each_other(cluster: str) -> None:
    one, two = announce(cluster, "desk", 7001), announce(cluster, "attic", 7002)
    async with running(one) as (_, seen_by_one), running(two) as (_, seen_by_two):
        found = await seen_by_one.found(two.peer)
        assert found == PeerFound(
            source="mdns",
            peer=two.peer,
            addresses=(HERE,),
            port=7002,
            name="attic",
            cluster=cluster,
            protocol="1.0",
            version="0.1.0",
            load=0,
        )
        assert (await seen_by_two.found(one.peer)).name == "desk"


async def test_a_peer_that_starts_later_finds_the_others(cluster: str) -> None:
    one, two = announce(cluster), announce(cluster)
    async with running(one) as (_, seen_by_one):
        await asyncio.sleep(0.6)
        async with running(two) as (_, seen_by_two):
            await seen_by_two.found(one.peer, within_s=1.0)
            await seen_by_one.found(two.peer, within_s=1.0)


async def test_a_goodbye_is_seen_within_a_second(cluster: str) -> None:
    one, two = announce(cluster), announce(cluster)
    async with running(one) as (_, seen):
        async with running(two):
            await seen.found(two.peer)
        gone = await seen.until(lambda each: isinstance(each, PeerWithdrawn), within_s=1.0)
        assert gone == PeerWithdrawn(source="mdns", peer=two.peer)


async def test_peers_of_another_cluster_are_counted_and_not_reported(cluster: str) -> None:
    ours, theirs, ours_too = announce(cluster), announce(other := random_letters()[:16]), announce(cluster)
    async with running(ours) as (mdns, seen), running(theirs):
        async with running(ours_too):
            await seen.found(ours_too.peer)
            await eventually(lambda: other in mdns.other_clusters())
        assert mdns.other_clusters()[other] == 1
        assert {each.peer for each in seen.sightings if isinstance(each, PeerFound)} == {ours_too.peer}


async def test_a_peers_own_records_are_not_reported(cluster: str) -> None:
    one, two = announce(cluster), announce(cluster)
    async with running(one) as (_, seen), running(two):
        await seen.found(two.peer)
        assert {each.peer for each in seen.sightings if isinstance(each, PeerFound | DuplicateIdentity)} == {two.peer}


async def test_a_copied_identity_is_reported(cluster: str) -> None:
    original = announce(cluster, port=7001)
    async with running(original) as (_, seen), running(replace(original, port=7002)):
        duplicate = await seen.until(lambda each: isinstance(each, DuplicateIdentity))
        assert duplicate == DuplicateIdentity(source="mdns", peer=original.peer, addresses=(HERE,), port=7002)


async def test_a_change_of_load_is_announced(cluster: str) -> None:
    one, two = announce(cluster), announce(cluster)
    sessions = 0
    async with running(one) as (_, seen), running(two, clock=QuickClock(), load=lambda: sessions):
        await seen.found(two.peer)
        sessions = 2
        await seen.until(lambda each: isinstance(each, PeerFound) and each.load == 2)


async def test_other_clusters_on_the_network_are_reported_until_they_have_gone(cluster: str) -> None:
    ours, theirs = announce(cluster), announce(other := random_letters()[:16])
    async with running(ours, clock=QuickClock()) as (_, seen):
        async with running(theirs):
            await seen.until(lambda each: isinstance(each, OtherClusters) and other in each.peers)
            seen.sightings.clear()
        await seen.until(lambda each: isinstance(each, OtherClusters) and other not in each.peers)


async def test_forged_records_cause_few_reports(cluster: str) -> None:
    """One host on the LAN can announce any number of peers, again and again."""
    reported: list[Sighting] = []
    mdns = MdnsDiscovery(announce(cluster), reported.append, clock=SetClock(5.0), interfaces=[HERE])
    mdns._read_interfaces()
    peers = [PeerId(random_letters()) for _ in range(2000)]
    for peer in peers * 3:
        mdns._report(PeerFound(source="mdns", peer=peer, addresses=(HERE,), port=7000, cluster=cluster))
    assert len(reported) == 256
    reported.clear()
    for peer in peers:
        mdns._report(PeerFound(source="mdns", peer=peer, addresses=("8.8.8.8", "224.0.0.1"), port=7000, cluster=cluster))
    assert reported == []


async def test_an_interface_that_appears_later_is_used(cluster: str) -> None:
    present: list[Interface] = []
    one, two = announce(cluster), announce(cluster)
    async with running(one) as (_, seen), running(two, clock=QuickClock(), scan=lambda: present) as (mdns, seen_by_two):
        notice = await seen_by_two.until(lambda each: isinstance(each, SourceNotice))
        assert isinstance(notice, SourceNotice)
        assert "no peer is looked for on 127.0.0.1 (not here)" in notice.message
        assert not [each for each in seen.sightings if isinstance(each, PeerFound)]
        present.append(
            Interface(name="lo", index=1, kind=InterfaceKind.LOOPBACK, up=True, multicast=False, networks=("127.0.0.1/8",)),
        )
        await seen.found(two.peer)
        await seen_by_two.found(one.peer)
        assert [choice.used for choice in mdns.interfaces] == [True]


async def test_a_missing_permission_for_the_port_is_reported_once_and_retried(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = iter(range(3))

    def refused_at_first(interfaces: list[str]) -> AsyncZeroconf:
        if next(refusals, None) is not None:
            raise PermissionError(13, "Permission denied")
        return AsyncZeroconf(interfaces=interfaces)

    one, two = announce(cluster), announce(cluster)
    async with running(one) as (_, seen):
        await asyncio.sleep(0)
        monkeypatch.setattr("meshd.agents.membership.mdns.AsyncZeroconf", refused_at_first)
        async with running(two, clock=QuickClock()) as (_, seen_by_two):
            await seen.found(two.peer)
            await seen_by_two.until(lambda each: isinstance(each, SourceNotice) and each.about == "mdns" and not each.message)
            notices = [each.message for each in seen_by_two.sightings if isinstance(each, SourceNotice) and each.about == "mdns"]
            assert len(notices) == 2
            assert "Permission denied" in notices[0]


class WakingClock(QuickClock):
    """Shows a wall time that is `slept_s` ahead, as after the device slept for that long."""

    slept_s = 0.0
    _moment: float | None = None

    def wall(self) -> float:
        """As the monotonic time that is asked for next, which is of the same moment: 0.1 s between both would be 5 s here."""
        self._moment = super().monotonic()
        return self._moment + self.slept_s

    def monotonic(self) -> float:
        moment, self._moment = self._moment, None
        return super().monotonic() if moment is None else moment


class LateClock(WakingClock):
    """The device sleeps as soon as this peer waits for the first time after it has begun to register."""

    async def sleep(self, seconds: float) -> None:
        self.slept_s = 3600.0
        await super().sleep(seconds)


async def test_a_sleep_while_a_peer_registers_is_noticed(cluster: str) -> None:
    one, two = announce(cluster), announce(cluster)
    async with running(one) as (_, seen), running(two, clock=LateClock()) as (mdns, _):
        moved: list[bool] = []
        move = mdns._move

        async def moving(*arguments: Any) -> None:
            moved.append(True)
            await move(*arguments)

        mdns._move = moving  # type: ignore[method-assign]
        await seen.found(two.peer)
        await eventually(lambda: moved)


async def test_after_a_sleep_a_peer_announces_itself_again(cluster: str) -> None:
    one, two, clock = announce(cluster), announce(cluster), WakingClock()
    async with running(one) as (_, seen), running(two, clock=clock):
        await seen.found(two.peer)
        # zeroconf drops a packet that repeats within 0.8 s
        await asyncio.sleep(1.5)
        before = len(seen.sightings)
        clock.slept_s = 3600.0
        await eventually(lambda: len(seen.sightings) > before)
        assert isinstance(seen.sightings[-1], PeerFound)
