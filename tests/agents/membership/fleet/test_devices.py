"""The list of devices: merged in any order, stored, and the same on all peers."""

import asyncio
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from in_process.peers import Peer, Peers, until
from meshd.agents.membership.fleet.devices import DEVICES_FILE, DeviceList, Devices, load_devices, merge, update_devices
from meshd.bounds import MAX_MQTT_DEVICES
from meshd.errors import StorageError
from meshd.protocol.messages import Message, MqttDevices
from meshd.protocol.transport import Buffer
from meshd.state import StateFolder
from meshd.types import MqttDevice, PeerId


def device(number: int, revoked: float = 0.0) -> MqttDevice:
    return MqttDevice(serial=f"{number:032x}", name=f"d{number}", check="00c0ffee", added=float(number), revoked=revoked)


lists = st.lists(st.builds(device, st.integers(0, 5), st.sampled_from([0.0, 1.0, 2.0])), max_size=6)


def as_dict(devices: list[MqttDevice]) -> Devices:
    return merge({}, devices)


@given(a=lists, b=lists, c=lists)
def test_lists_are_merged_in_any_order(a: list[MqttDevice], b: list[MqttDevice], c: list[MqttDevice]) -> None:
    one = merge(merge(as_dict(a), b), c)
    assert one == merge(merge(as_dict(c), a), b)
    assert merge(one, one.values()) == one


def test_a_revocation_is_never_taken_back() -> None:
    revoked = merge({device(1).serial: device(1)}, [device(1, 5.0)])
    assert merge(revoked, [device(1)]) == revoked
    assert merge(revoked, [device(1, 3.0)])[device(1).serial].revoked == 3.0


def test_a_list_is_bounded() -> None:
    assert len(merge({}, map(device, range(MAX_MQTT_DEVICES + 10)))) == MAX_MQTT_DEVICES


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    folder = StateFolder.open(tmp_path / "state")
    folder.write(DEVICES_FILE, b"[{}]")
    with pytest.raises(StorageError, match=DEVICES_FILE):
        load_devices(folder)


class Site:
    """A peer with its list of devices."""

    def __init__(self, peer: Peer, folder: StateFolder) -> None:
        self.peer, self.folder = peer, folder
        self.list = DeviceList(peer.links, folder)
        self.list.register()
        self.task = asyncio.create_task(self.list.run())

    def add(self, *devices: MqttDevice) -> None:
        """Add to the stored list, as the command line does."""
        update_devices(self.folder, lambda known: merge(known, devices))

    def knows(self, one: MqttDevice) -> bool:
        return (self.list.valid(one.serial) is not None) == (not one.revoked) and load_devices(self.folder).get(one.serial) == one


async def test_a_key_and_its_revocation_reach_all_peers_and_their_disks(peers: Peers, tmp_path: Path) -> None:
    sites = []
    for name in "abc":
        peer = peers.start(name)
        sites.append(Site(peer, StateFolder.open(tmp_path / f"devices-{name}")))
    a, b, c = sites
    try:
        a.add(device(1))
        a.peer.dial(b.peer)
        await until(lambda: b.peer.id in a.peer.links.peers())
        a.list.greet(b.peer.id)
        await until(lambda: a.knows(device(1)) and b.knows(device(1)))
        b.add(device(1, 7.0))
        await until(lambda: a.knows(device(1, 7.0)) and b.knows(device(1, 7.0)))
        # A peer that was off gets the list when it is back, and can't bring the key back.
        c.add(device(1), device(2))
        await until(lambda: c.knows(device(2)))
        c.peer.dial(b.peer)
        await until(lambda: b.peer.id in c.peer.links.peers() and c.peer.id in b.peer.links.peers())
        c.list.greet(b.peer.id)
        b.list.greet(c.peer.id)
        await until(lambda: all(site.knows(device(1, 7.0)) and site.knows(device(2)) for site in sites))
    finally:
        for site in sites:
            site.task.cancel()


async def test_a_member_that_changes_the_list_again_and_again_costs_few_writes_and_messages(
    peers: Peers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = [Site(peers.start(name), StateFolder.open(tmp_path / f"devices-{name}")) for name in "abc"]
    a, hostile, c = sites
    hostile.task.cancel()
    stored: list[str] = []
    told: list[PeerId] = []
    write, send = a.folder.write, a.peer.links.send

    def writing(name: str, data: bytes) -> None:
        stored.append(name)
        write(name, data)

    monkeypatch.setattr(a.folder, "write", writing)

    def noted(peer: PeerId, message: Message, payload: Buffer | None = None) -> None:
        told.append(peer)
        send(peer, message, payload)

    monkeypatch.setattr(a.peer.links, "send", noted)
    try:
        for site in (hostile, c):
            site.peer.dial(a.peer)
        await until(lambda: len(a.peer.links.peers()) == 2 and a.peer.id in hostile.peer.links.peers())
        for at in range(300, 0, -1):
            hostile.peer.links.send(a.peer.id, MqttDevices(devices=(device(1, float(at)),)))
        await until(lambda: a.knows(device(1, 1.0)) and c.knows(device(1, 1.0)))
    finally:
        for site in sites:
            site.task.cancel()
    assert 0 < len(stored) <= 5
    assert told.count(c.peer.id) <= 5


def test_the_entries_fit_a_message() -> None:
    longest = [msgspec.structs.replace(device(number, 1.5), name="n" * 63, check="c" * 8) for number in range(MAX_MQTT_DEVICES)]
    assert len(msgspec.msgpack.encode(longest)) < 60 << 10
