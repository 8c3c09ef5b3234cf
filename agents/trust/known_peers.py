"""Every peer that was ever linked with this one, when and from where, on disk: the owner decides which of them stay."""

import asyncio
from collections import Counter
from collections.abc import Callable
from logging import getLogger
from typing import Annotated

import msgspec

from meshd.agents.links.half_open import origin_of
from meshd.bounds import Label, PeerName, Sha256, Timestamp, at_most
from meshd.clock import Clock
from meshd.errors import MeshdError
from meshd.protocol.trust import MAX_STAYING
from meshd.state import Folder
from meshd.types import PeerId

log = getLogger(__name__)

NAME = "known-peers.json"
MAX_KNOWN = MAX_STAYING - 1
"""All of them can stay in a rotation, with this peer itself."""
_SAVE_S = 2.0
"""Shortest time between two writes, so that a member that links again and again does not wear the disk out."""


class KnownPeer(msgspec.Struct, frozen=True, kw_only=True):
    """A peer that was linked with this one. Times are Unix times."""

    peer: PeerId
    name: PeerName
    first_at: Timestamp
    first_address: Label
    last_at: Timestamp
    last_address: Label
    authority: Sha256
    """SHA-256 of the public key of the authority that had certified it when it linked last: it had that cluster key."""


class _Document(msgspec.Struct, frozen=True):
    peers: Annotated[list[KnownPeer], at_most(MAX_KNOWN)] = []


class KnownPeers:
    """The register. Changes are made in memory, and `run` writes them."""

    def __init__(self, folder: Folder, clock: Clock) -> None:
        """Read the register. One that can't be read is logged once, and an empty one begun."""
        self._folder = folder
        self._clock = clock
        self.belongs: Callable[[PeerId], bool] = lambda peer: False
        """Whether a peer belongs to the cluster: those that do not are the first that are dropped to make room."""
        self.listed: Callable[[PeerId], bool] = lambda peer: False
        """Whether the owner has listed a peer: such a peer is not dropped."""
        self._changed = asyncio.Event()
        self._peers: dict[PeerId, KnownPeer] = {}
        self._written = self._encoded()
        try:
            data = folder.read(NAME)
            document = msgspec.json.decode(data, type=_Document) if data else _Document()
        except (MeshdError, msgspec.DecodeError) as error:
            log.warning("which peers were linked before is not known: %s can't be read: %s", NAME, error)
            return
        self._peers = {known.peer: known for known in document.peers}
        self._written = self._encoded()

    def all(self) -> list[KnownPeer]:
        """Returns: all peers, those known longest first."""
        return sorted(self._peers.values(), key=lambda known: (known.first_at, known.peer))

    def get(self, peer: PeerId) -> KnownPeer | None:
        return self._peers.get(peer)

    def linked(self, peer: PeerId, name: str, address: str, authority: str) -> None:
        """Record a link that came up. `authority`: as `KnownPeer.authority`."""
        now = self._clock.wall()
        known = self._peers.get(peer)
        if known is None:
            if len(self._peers) >= MAX_KNOWN and not self._make_room(address):
                log.warning("%s (%.8s) is not recorded: %d peers are known already", name, peer, MAX_KNOWN)
                return
            known = KnownPeer(
                peer=peer,
                name=name,
                first_at=now,
                first_address=address,
                last_at=now,
                last_address=address,
                authority=authority,
            )
        self._peers[peer] = msgspec.structs.replace(known, name=name, last_at=now, last_address=address, authority=authority)
        self._changed.set()

    def ended(self, peer: PeerId) -> None:
        """Record that a link has ended."""
        if (known := self._peers.get(peer)) is not None:
            self._peers[peer] = msgspec.structs.replace(known, last_at=self._clock.wall())
            self._changed.set()

    async def run(self) -> None:
        """Write the register whenever it has changed. Cancel: writes what is not written yet."""
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                data = self._encoded()
                await asyncio.to_thread(self._write, data)
                self._written = data
                await self._clock.sleep(_SAVE_S)
        finally:
            if (data := self._encoded()) != self._written:
                self._write(data)

    def _encoded(self) -> bytes:
        return msgspec.json.encode(_Document(self.all()))

    def _write(self, data: bytes) -> None:
        try:
            self._folder.write(NAME, data)
        except MeshdError as error:
            log.warning("which peers were linked is not recorded: %s", error)

    def _make_room(self, address: str) -> bool:
        """Drop the newest peer of the host from which most were first seen: a member can make any number of identities, which
        belong to the cluster like any other that links with its key. The only peer of a host is dropped only if it does not belong.

        Returns: False if that is the newcomer's own host, or no peer may be dropped.
        """
        for stays, fewest in ((self.belongs, 1), (self.listed, 2)):
            spare = [known for known in self._peers.values() if not stays(known.peer)]
            hosts = Counter(origin_of(known.first_address) for known in spare)
            count = max(hosts.values(), default=0)
            if count >= fewest and hosts[origin_of(address)] < count:
                crowded = [known for known in spare if hosts[origin_of(known.first_address)] == count]
                newest = max(crowded, key=lambda known: known.first_at)
                del self._peers[newest.peer]
                return True
        return False
