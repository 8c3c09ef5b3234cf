"""The devices that may send jobs over MQTT: a list that every peer stores, and that peers bring one another up to date with.

A key is valid if its serial is in the list and not revoked. A revocation is never taken back, so lists of any age can be merged in
any order. The keys themselves are nowhere: each member derives them from the cluster key.
"""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from logging import getLogger

import msgspec

from meshd.agents.links.links import Links
from meshd.agents.links.rpc import try_send
from meshd.bounds import MAX_MQTT_DEVICES
from meshd.errors import StorageError
from meshd.protocol.messages import MqttDevices
from meshd.state import FileSignature, StateFolder
from meshd.types import MqttDevice, PeerId

log = getLogger(__name__)

FEATURE = "mqtt"
DEVICES_FILE = "mqtt-devices.json"
_LOCK = "mqtt-devices"
_LOOK_S = 1.0
"""How often a daemon looks whether the command line has changed the file. Also the shortest time between two changes that it stores
and sends to all others: a member could change the list with each message."""
_DECODER = msgspec.json.Decoder(tuple[MqttDevice, ...])
Devices = dict[str, MqttDevice]
"""By serial."""


def merge(known: Devices, others: Iterable[MqttDevice]) -> Devices:
    """Merge lists of devices. Entries beyond the most that a list can have are left out, those added last first."""
    merged = dict(known)
    for device in sorted(others, key=lambda each: (each.added, each.serial)):
        before = merged.get(device.serial)
        if before is not None:
            times = [time for time in (before.revoked, device.revoked) if time]
            merged[device.serial] = msgspec.structs.replace(before, revoked=min(times, default=0.0))
        elif len(merged) < MAX_MQTT_DEVICES:
            merged[device.serial] = device
    return merged


def load_devices(folder: StateFolder) -> Devices:
    """Load the list. Raises: StorageError if the file is broken."""
    data = folder.read(DEVICES_FILE)
    if data is None:
        return {}
    try:
        return {device.serial: device for device in _DECODER.decode(data)}
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        path = folder.path / DEVICES_FILE
        raise StorageError(f"{path} is broken: {error}", hint="remove it: another peer has the list") from error


def update_devices(folder: StateFolder, change: Callable[[Devices], Devices]) -> Devices:
    """Change the stored list; a daemon and the command line may do so at the same time.

    Returns: the new list.
    Raises: StorageError.
    """
    with folder.exclusive(_LOCK):
        devices = load_devices(folder)
        changed = change(devices)
        if changed != devices:
            folder.write(DEVICES_FILE, msgspec.json.encode(tuple(changed.values())))
    return changed


def _with(others: Devices, known: Devices) -> Devices:
    return merge(known, others.values())


class DeviceList:
    """This peer's list: follows the stored one, and exchanges it with the other peers."""

    def __init__(self, links: Links, folder: StateFolder | None) -> None:
        """Without a folder, as in the simulator, nothing is stored. Raises: StorageError."""
        self._links = links
        self._folder = folder
        self._devices = load_devices(folder) if folder is not None else {}
        self._told = self._devices
        """The list that all linked peers were sent."""
        self._stamp = self._read_stamp()
        self._received: Devices = {}
        """Devices from other peers that are not stored yet."""
        self._changed = asyncio.Event()

    def register(self) -> None:
        """Register the handler of MQTT_DEVICES."""
        self._links.register(MqttDevices, self._on_devices)

    def valid(self, serial: str) -> MqttDevice | None:
        """Returns: the device with this serial, if its key is valid."""
        device = self._devices.get(serial)
        return device if device is not None and not device.revoked else None

    def greet(self, peer: PeerId) -> None:
        """Send the list to a peer whose link has come up."""
        if self._devices and FEATURE in self._links.features(peer):
            try_send(self._links.send, peer, MqttDevices(devices=tuple(self._devices.values())))

    async def run(self) -> None:
        """Store what other peers send, and send what has changed."""
        while True:
            try:
                async with asyncio.timeout(_LOOK_S if self._folder is not None else None):
                    await self._changed.wait()
            except TimeoutError:
                if self._read_stamp() == self._stamp:
                    continue
            self._changed.clear()
            self._tell()
            if self._folder is not None:
                await self._store(self._folder)
                self._tell()
            await asyncio.sleep(_LOOK_S)

    async def _store(self, folder: StateFolder) -> None:
        """Store what other peers have sent, and read what the command line has changed. Raises: StorageError."""
        received, self._received = self._received, {}
        stamp = self._read_stamp()
        try:
            devices = await asyncio.to_thread(update_devices, folder, partial(_with, received))
        except StorageError:
            self._received = merge(received, self._received.values())
            raise
        # Read before the update, so that a change of the command line during it is seen. An own change causes one more look.
        self._stamp = stamp
        self._devices = merge(devices, self._received.values())

    def _tell(self) -> None:
        if self._devices != self._told:
            self._told = self._devices
            for peer in self._links.peers():
                self.greet(peer)

    def _on_devices(self, sender: PeerId, message: MqttDevices, payload: memoryview) -> None:
        merged = merge(self._devices, message.devices)
        if merged != self._devices:
            self._received = merge(self._received, message.devices)
            self._devices = merged  # a revocation counts at once, not only when it is stored
            self._changed.set()

    def _read_stamp(self) -> FileSignature | None:
        with suppress(OSError):
            return self._folder.signature(DEVICES_FILE) if self._folder is not None else None
        return None
