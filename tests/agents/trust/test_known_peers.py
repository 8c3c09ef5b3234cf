"""The register of peers that were ever linked."""

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from ids import peer_id
from in_process.clocks import SetClock
from meshd.agents.trust.files import StateFiles
from meshd.agents.trust.known_peers import MAX_KNOWN, NAME, KnownPeers
from meshd.agents.trust.trust import Trust
from meshd.protocol.cluster_key import ClusterKey
from meshd.protocol.trust import RotationChain
from meshd.state import StateFolder

AUTHORITY, LATER = "ab" * 32, "cd" * 32


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    return StateFolder.open(tmp_path)


async def saved(known: KnownPeers) -> None:
    """Run the register until it is cancelled, which writes what is not written yet."""
    task = asyncio.ensure_future(known.run())
    await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_the_first_time_and_place_stay_and_the_last_ones_change(folder: StateFolder) -> None:
    clock = SetClock()
    known = KnownPeers(folder, clock)
    known.linked(peer_id("a"), "a", "192.168.1.5", AUTHORITY)
    clock.now = 2000.0
    known.linked(peer_id("a"), "attic", "192.168.1.9", LATER)
    clock.now = 3000.0
    known.ended(peer_id("a"))
    known.ended(peer_id("never linked"))
    await saved(known)
    (row,) = KnownPeers(folder, clock).all()
    assert (row.first_at, row.first_address, row.last_at, row.last_address) == (1000.0, "192.168.1.5", 3000.0, "192.168.1.9")
    assert (row.name, row.authority) == ("attic", LATER)


async def test_a_member_that_makes_identities_displaces_only_its_own(folder: StateFolder) -> None:
    """Its identities belong to the cluster, since they link with the present key."""
    known = KnownPeers(folder, SetClock())
    key = ClusterKey(bytes(32))
    trust = Trust(peer_id("me"), key, RotationChain(key.owner), StateFiles(folder, SetClock()), known)
    honest = [peer_id(f"honest {number}") for number in range(5)]
    for number, peer in enumerate(honest):
        known.linked(peer, "honest", f"192.168.1.{number}", trust.authority)
    for number in range(MAX_KNOWN + 50):
        known.linked(peer_id(f"minted {number}"), "minted", "192.168.1.66", trust.authority)
    known.linked(peer_id("late"), "late", "192.168.1.7", trust.authority)
    assert len(known.all()) == MAX_KNOWN
    assert all(known.get(peer) is not None for peer in [*honest, peer_id("late")])


async def test_peers_that_do_not_belong_make_room_first(folder: StateFolder) -> None:
    known = KnownPeers(folder, SetClock())
    known.belongs = lambda peer: peer != peer_id("7")
    for number in range(MAX_KNOWN):
        known.linked(peer_id(f"{number}"), "a", "192.168.1.66", AUTHORITY)
    known.linked(peer_id("late"), "late", "192.168.1.7", AUTHORITY)
    assert {peer for number in range(MAX_KNOWN) if known.get(peer := peer_id(f"{number}")) is None} == {peer_id("7")}


async def test_the_only_peer_of_a_host_makes_no_room_if_it_belongs(folder: StateFolder) -> None:
    known = KnownPeers(folder, SetClock())
    known.belongs = lambda peer: True
    for number in range(MAX_KNOWN):
        known.linked(peer_id(f"{number}"), "a", f"10.0.{number // 250}.{number % 250}", AUTHORITY)
    known.linked(peer_id("late"), "late", "192.168.1.7", AUTHORITY)
    assert known.get(peer_id("late")) is None


async def test_peers_that_the_owner_has_listed_make_no_room(folder: StateFolder) -> None:
    known = KnownPeers(folder, SetClock())
    known.belongs = known.listed = lambda peer: True
    for number in range(MAX_KNOWN):
        known.linked(peer_id(f"{number}"), "a", "192.168.1.66", AUTHORITY)
    known.linked(peer_id("late"), "late", "192.168.1.7", AUTHORITY)
    assert known.get(peer_id("late")) is None


@pytest.mark.parametrize("content", [b"junk", b"{}", b'{"peers": [{"peer": "x"}]}', b"\xff"])
async def test_a_broken_file_is_an_empty_register(folder: StateFolder, content: bytes) -> None:
    folder.write(NAME, content)
    known = KnownPeers(folder, SetClock())
    assert known.all() == []
    known.linked(peer_id("a"), "a", "::1", AUTHORITY)
    assert known.get(peer_id("a")) is not None
