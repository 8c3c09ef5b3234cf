"""Finds the peers of a cluster on the LAN by mDNS. A find is only a hint: only an authenticated link proves who the peer is.

Everyone on the LAN can read what mDNS sends: the peer's id (the instance name), the link's port (SRV), and in TXT the cluster's
public fingerprint, the protocol and software versions, the device's name and its number of sessions. mDNS sends nothing else.

Everyone on the LAN can also forge it: only addresses on this device's own networks are used, records live no longer than usual, and
reports have a budget.

Speed. By RFC 6762 section 8.1 a responder probes before it announces (zeroconf takes 1.2 s for that), unless it knows by other
means that its name is unique. A peer's name is the hash of its public key, so the peer announces at once. It still sends one probe,
because all responders answer a probe immediately, so that a new peer finds all others within milliseconds.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from zeroconf import Error as ZeroconfError
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from meshd.agents.budget import TokenBucket
from meshd.agents.membership.interfaces import (
    Interface,
    InterfaceChoice,
    choice_warning,
    choose_interfaces,
    on_own_networks,
    present_interfaces,
    used_addresses,
)
from meshd.agents.membership.mdns_records import Announcement, PointerListener, Resolver, SayOnce, browse, probe, to_info
from meshd.agents.membership.sources import DuplicateIdentity, OnSighting, OtherClusters, PeerFound, PeerWithdrawn, SourceNotice
from meshd.agents.supervisor import raise_if_cancelled
from meshd.clock import Clock
from meshd.types import PeerId
from meshd.values import Address

RECHECK_S = 2.0
"""Interval between checks of the list of interfaces."""
_AGAIN_S = 1.0
"""Delay of the second announcement (RFC 6762 section 8.3). zeroconf drops a packet that equals one from the last 0.8 s, so other
peers may miss the first announcement of a peer that crashes and restarts at once."""
_LOAD_EVERY_S = 10.0
"""Shortest time between two announcements of a changed load."""
_REPEAT_S = 1.0
"""Shortest time between two reports of the same records of one peer."""
_REPORTS_S, _REPORTS_AT_ONCE = 20.0, 256
"""Reports per second, and at once. A flood of forged records is dropped; an honest peer among them dials this one."""
_OTHER_CLUSTERS = 3
"""Number of other clusters that are named to the user, those with most peers first."""
_WOKEN_S = 5.0
"""If the wall clock has advanced by this much more than the monotonic clock between two checks, the device was asleep."""
_MAX_PEERS = 256
"""Maximum number of peers remembered of this cluster, and of all others together, so that forged records can't fill memory."""
_ANY_HOST = frozenset({"", "0.0.0.0", "::"})
_T = TypeVar("_T")


class MdnsDiscovery:
    """Advertises this peer and listens for other peers, on every usable interface or on those that the user named."""

    def __init__(
        self,
        announcement: Announcement,
        on_sighting: OnSighting,
        *,
        clock: Clock,
        interfaces: Sequence[str] = (),
        host: str = "0.0.0.0",
        scan: Callable[[], list[Interface]] = present_interfaces,
        load: Callable[[], int] = lambda: 0,
    ) -> None:
        """`interfaces` are names or addresses. `host` is where links listen; unless it is a wildcard, only `host` is advertised.

        `load` returns the number of sessions that have a stage on this peer.
        """
        self._announcement = announcement
        self._on_sighting = on_sighting
        self._clock = clock
        self._host = "" if host in _ANY_HOST else host
        self._named = tuple(interfaces) or ((self._host,) if self._host else ())
        self._scan = scan
        self._choices: list[InterfaceChoice] = []
        self._own_addresses: set[str] = set()
        self._others: dict[PeerId, PeerFound] = {}
        self._others_reported: dict[str, int] = {}
        self._present: dict[PeerId, tuple[PeerFound, float]] = {}
        """The newest records of each peer of this cluster, and when they were reported last."""
        self._budget = TokenBucket(_REPORTS_S, _REPORTS_AT_ONCE)
        self._load = load
        self._announced_load = 0
        self._offset_s = 0.0
        """By how much the wall clock was ahead of the monotonic one, which stands still while the device sleeps."""
        self._say_once = SayOnce()
        self._noticed: dict[str, tuple[str, str] | None] = {}

    @property
    def interfaces(self) -> list[InterfaceChoice]:
        """Every interface at the last check, with whether it is used and why."""
        return list(self._choices)

    def other_clusters(self) -> dict[str, int]:
        """Returns: how many peers of each other cluster were seen, by the cluster's fingerprint."""
        counts: dict[str, int] = {}
        for found in self._others.values():
            counts[found.cluster] = counts.get(found.cluster, 0) + 1
        return counts

    async def run(self) -> None:
        """Advertise and listen. If the system does not allow mDNS, report that to the user and retry.

        Cancel: sends a goodbye, which takes 0.3 s.
        """
        zeroconf_log = logging.getLogger("zeroconf")
        zeroconf_log.addFilter(self._say_once)
        try:
            while True:
                self._read_interfaces()
                try:
                    zeroconf = AsyncZeroconf(interfaces=self._addresses())
                except OSError as error:
                    self._notice("mdns", _failure(error))
                else:
                    await self._serve(zeroconf)
                await self._clock.sleep(RECHECK_S)
        finally:
            zeroconf_log.removeFilter(self._say_once)

    async def _serve(self, zeroconf: AsyncZeroconf) -> None:
        """Advertise and listen until cancelled or until mDNS fails."""
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._advertise_and_listen(zeroconf, tasks)
        except* (OSError, ZeroconfError) as group:
            raise_if_cancelled()
            self._notice("mdns", _failure(group.exceptions[0]))
        finally:
            await zeroconf.async_close()

    async def _advertise_and_listen(self, zeroconf: AsyncZeroconf, tasks: asyncio.TaskGroup) -> None:
        zc = zeroconf.zeroconf
        self._offset_s = self._clock.wall() - self._clock.monotonic()
        # Add the listener before the first await: a record that arrives before that is cached and never reported.
        zc.async_add_listener(PointerListener(Resolver(zc, tasks, self._report).heard, self._gone), None)
        browser = browse(zc)
        try:
            await zc.async_wait_for_start()
            probe(zc, self._info())
            await (await zeroconf.async_register_service(self._info(), cooperating_responders=True))
            self._notice("mdns", None)
            await self._clock.sleep(_AGAIN_S)
            await (await zeroconf.async_update_service(self._info()))
            while True:
                await self._wait_for_change(zeroconf)
                await browser.async_cancel()
                browser = browse(zc)
                probe(zc, self._info())
        finally:
            await browser.async_cancel()

    async def _wait_for_change(self, zeroconf: AsyncZeroconf) -> None:
        """Announce changes of load until the interfaces change or the device wakes up; then announce on the present interfaces."""
        since = self._clock.monotonic()
        while True:
            before, offset_s = self._choices, self._offset_s
            await self._clock.sleep(RECHECK_S)
            self._read_interfaces()
            self._report_other_clusters()
            self._offset_s = self._clock.wall() - self._clock.monotonic()
            if self._offset_s - offset_s > _WOKEN_S or _bound(before) != _bound(self._choices):
                return await self._move(zeroconf, before)
            if self._load() != self._announced_load and self._clock.monotonic() - since >= _LOAD_EVERY_S:
                since = self._clock.monotonic()
                await (await zeroconf.async_update_service(self._info()))

    async def _move(self, zeroconf: AsyncZeroconf, before: list[InterfaceChoice]) -> None:
        """Announce this peer on the present interfaces.

        Sockets are reopened on every interface that has changed, even if it has the same address as `before`.
        """
        announcing = await zeroconf.async_update_service(self._info())
        unchanged = {address for _, _, address in _bound(before) & _bound(self._choices)}
        await zeroconf.async_update_interfaces([address for address in self._addresses() if address in unchanged])
        await zeroconf.async_update_interfaces(self._addresses())
        await announcing

    def _read_interfaces(self) -> None:
        self._choices = choose_interfaces(self._scan(), self._named)
        self._own_addresses.update(self._addresses())
        self._notice("interfaces", choice_warning(self._choices, self._named))

    def _addresses(self) -> list[str]:
        addresses = used_addresses(self._choices)
        return [self._host] if self._host in addresses else addresses

    def _info(self) -> AsyncServiceInfo:
        """Build the records to announce, and store their load as the last announced one."""
        self._announced_load = self._load()
        return to_info(self._announcement, self._announced_load, self._addresses())

    def _report(self, found: PeerFound) -> None:
        """Report a peer of this cluster, unless it is the same report again or there are too many. Remember those of others."""
        found = replace(found, addresses=on_own_networks(found.addresses, self._choices))
        peer = found.peer
        if peer is None or not found.addresses:
            return
        if peer == self._announcement.peer:
            self._report_duplicate(found)
        elif found.cluster != self._announcement.cluster:
            self._gone(peer)
            _remember(self._others, peer, found)
        else:
            self._others.pop(peer, None)
            now = self._clock.monotonic()
            known, reported = self._present.get(peer, (None, 0.0))
            if (found == known and now - reported < _REPEAT_S) or not self._budget.take(now):
                return
            _remember(self._present, peer, (found, now))
            self._on_sighting(found)

    def _report_other_clusters(self) -> None:
        counts = self.other_clusters()
        most = {cluster: counts[cluster] for cluster in sorted(counts, key=lambda each: (-counts[each], each))[:_OTHER_CLUSTERS]}
        if most.keys() != self._others_reported.keys():
            self._others_reported = most
            where = {found.cluster: Address(found.addresses[0], found.port) for found in self._others.values()}
            self._on_sighting(OtherClusters(source="mdns", peers=most, addresses={each: where[each] for each in most}))

    def _report_duplicate(self, found: PeerFound) -> None:
        """Report a daemon that uses a copy of this peer's identity.

        This peer also receives its own records. Only another device's addresses or another port show a duplicate.
        """
        foreign = tuple(address for address in found.addresses if address not in self._own_addresses)
        if foreign or found.port != self._announcement.port:
            addresses = foreign or found.addresses
            self._on_sighting(DuplicateIdentity(source="mdns", peer=self._announcement.peer, addresses=addresses, port=found.port))

    def _gone(self, instance: str) -> None:
        peer = PeerId(instance)
        self._others.pop(peer, None)
        if self._present.pop(peer, None) is not None:
            self._on_sighting(PeerWithdrawn(source="mdns", peer=peer))

    def _notice(self, about: str, trouble: tuple[str, str] | None) -> None:
        """Report trouble to the user, unless the last report about this subject was equal. None: the trouble is over."""
        if trouble != self._noticed.get(about):
            self._noticed[about] = trouble
            message, hint = trouble or ("", "")
            self._on_sighting(SourceNotice(source="mdns", message=message, hint=hint, about=about))


def _failure(error: Exception) -> tuple[str, str]:
    hint = "free UDP port 5353, or let its owner share it; peers named by --peer are still dialled"
    return f"peers on the LAN can't be looked for by mDNS: {error}", hint


def _bound(choices: Sequence[InterfaceChoice]) -> set[tuple[int, str, str]]:
    """Returns: (index, name, address) of each interface in use. When this set changes, the sockets must be reopened."""
    return {
        (choice.interface.index, choice.interface.name, address)
        for choice in choices
        if choice.used
        for address in choice.interface.addresses
    }


def _remember(memory: dict[PeerId, _T], peer: PeerId, value: _T) -> None:
    """Store a value as the newest entry; beyond `_MAX_PEERS` entries, drop the oldest."""
    memory.pop(peer, None)
    memory[peer] = value
    if len(memory) > _MAX_PEERS:
        del memory[next(iter(memory))]
