"""What this peer believes of the cluster's key, and what it does when it hears of a rotation. No network.

A chain of rotations proves itself, so it does not matter who brings it. The cluster key is given only to a peer that may have it,
and its receiver checks it against the authority that the owner has signed.
"""

import asyncio
import hashlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from logging import getLogger
from typing import Any

from meshd.agents.trust.files import TrustFiles
from meshd.agents.trust.known_peers import KnownPeers
from meshd.errors import InvalidRequest, PeerRefused, ProtocolViolation
from meshd.protocol.cluster_key import KEY_BYTES, ClusterKey
from meshd.protocol.identity import Identity
from meshd.protocol.owner import OwnerKey
from meshd.protocol.trust import RotationChain, RotationRecord, Standing
from meshd.types import PeerId

log = getLogger(__name__)

EXCLUDED = "it was excluded from the cluster"
"""Beginning of the reason why there is no link with an excluded peer."""
SELF_EXCLUDED = "this device was excluded from its cluster"
JOIN_AGAIN = "the owner can let it in again: `meshd key show` there prints the code for `meshd key join CODE --replace` here"
OnAdopted = Callable[[Identity], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """What to tell a peer: this peer's chain, with the cluster key if `secret` is not empty."""

    secret: bytes = b""
    refusal: str = ""
    """Why there is no link with that peer; empty: there may be one."""


class Trust:
    """The cluster key, the rotations that led to it, and whether this peer was excluded."""

    def __init__(
        self,
        me: PeerId,
        key: ClusterKey,
        chain: RotationChain,
        files: TrustFiles,
        known: KnownPeers,
        *,
        exclusion: RotationChain | None = None,
    ) -> None:
        self.me = me
        self.key = key
        self.chain = chain
        self.known = known
        self.exclusion = exclusion
        """The rotations that exclude this peer. None: it belongs to the cluster."""
        self.outdated = False
        """Whether this device was joined by a code from before the newest rotation."""
        self.on_adopted: OnAdopted = lambda identity: None
        """Called when another key has been stored."""
        self.on_excluded: Callable[[], None] = lambda: None
        """Called when it is found that this peer was excluded, or its join code is outdated."""
        self.on_confirmed: Callable[[], None] = lambda: None
        """Called when it is found that the join code is not outdated after all."""
        known.belongs, known.listed = self.belongs, self.lists
        self._files = files
        self._lock = asyncio.Lock()

    @property
    def unconfirmed(self) -> bool:
        """Whether this peer was joined by the code of a later key, and does not know the rotations that led to it yet."""
        return self.key.generation > 0 and self.chain.last is None

    @property
    def authority(self) -> str:
        """SHA-256 of the present authority's public key."""
        return hashlib.sha256(self.key.issuer.public).hexdigest()

    def lists(self, peer: PeerId) -> bool:
        """Whether a peer is on the list of the newest rotation."""
        return self.chain.last is not None and peer in self.chain.last.peers

    def belongs(self, peer: PeerId) -> bool:
        """Whether a peer is on the list of the newest rotation, or has linked with the present cluster key.

        Such a peer is given the key, and may keep its link.
        """
        if self.lists(peer):
            return True
        known = self.known.get(peer)
        return peer == self.me or (known is not None and known.authority == self.authority)

    async def hear(self, peer: PeerId, chain: bytes, secret: bytes, *, linked: bool) -> Answer | None:
        """Take in what another peer says of the cluster's key.

        `linked`: whether the peer has proved that it has this peer's present key.
        Returns: what to answer; None: nothing.
        Raises: ProtocolViolation if it is malformed or not signed by the owner; PeerRefused; StorageError.
        """
        async with self._lock:
            told = RotationChain.decode(self.key.owner, chain)
            if self.unconfirmed and told.generation < self.key.generation:
                raise PeerRefused("it does not know the newest key of the cluster yet")
            match self.chain.standing_of(told):
                case Standing.SAME:
                    return None
                case Standing.CONFLICT:
                    raise PeerRefused("the owner key was changed in two ways at once", hint="found the cluster anew")
                case Standing.OLDER:
                    return self._inform(peer)
            return await self._follow(told, secret, linked=linked)

    async def order(self, chain: bytes, secret: bytes) -> None:
        """Take in a rotation that the owner has just signed on this device.

        Raises: InvalidRequest if it is not signed by the cluster's owner, or is not the next one; StorageError.
        """
        async with self._lock:
            try:
                told = RotationChain.decode(self.key.owner, chain)
                if self.chain.standing_of(told) is not Standing.NEWER or told.last is None or self.me not in told.last.peers:
                    raise InvalidRequest("the rotation does not follow this cluster's newest one", param="rotation")
                await _completed(self._adopt(self._proved_key(told.last, secret), told))
            except ProtocolViolation as error:
                raise InvalidRequest(f"the rotation is refused: {error}", param="rotation") from error

    async def take_owner_key(self, seed: bytes) -> None:
        """Store a copy of the owner key. Raises: ProtocolViolation if it is not this cluster's; StorageError."""
        try:
            key = OwnerKey.from_seed(seed)
        except ValueError as error:
            raise ProtocolViolation("an owner key has 32 bytes") from error
        if key.hash != self.chain.owner:
            raise ProtocolViolation("the key is not that of this cluster's owner")
        await asyncio.to_thread(self._files.store_owner, self.key.owner, key)

    def _inform(self, peer: PeerId) -> Answer:
        """Answer a peer that does not know the newest rotation."""
        if self.belongs(peer):
            return Answer(secret=self.key.secret)
        return Answer(refusal=f"{EXCLUDED} ({title(self.chain.last)})")

    async def _follow(self, told: RotationChain, secret: bytes, *, linked: bool) -> Answer | None:
        last = told.last
        assert last is not None, "a newer chain has a record"
        if last.authority == self.key.issuer.public:
            # This device was joined by the code of this very key, and learns the rotations that led to it.
            await _completed(self._confirm(told))
            return None
        if self.unconfirmed and not linked:
            # Whoever had the owner key once could have signed this: only the members' rotations tell who the owner is now.
            self.outdated = True
            self.on_excluded()
            return None
        if self.me not in last.peers:
            await _completed(self._be_excluded(told))
            return None
        if not secret:
            return Answer()
        await _completed(self._adopt(self._proved_key(last, secret), told))
        return None

    def _proved_key(self, record: RotationRecord, secret: bytes) -> ClusterKey:
        if len(secret) != KEY_BYTES:
            raise ProtocolViolation(f"a cluster key has {KEY_BYTES} bytes")
        key = ClusterKey(secret, self.key.owner, record.generation)
        if key.issuer.public != record.authority:
            raise ProtocolViolation("a cluster key is not the one that the owner has signed")
        return key

    async def _confirm(self, chain: RotationChain) -> None:
        await asyncio.to_thread(self._files.store, self.key, chain)
        self.chain = chain
        if self.outdated:  # a past member with an owner key of before said so
            self.outdated = False
            self.on_confirmed()

    async def _adopt(self, key: ClusterKey, chain: RotationChain) -> None:
        # The key is stored before it is used: after a crash this peer must not come back with the old one only.
        identity = await asyncio.to_thread(self._files.store, key, chain)
        self.key, self.chain, self.exclusion, self.outdated = key, chain, None, False
        log.info("the cluster has another key: %s", title(chain.last))
        self.on_adopted(identity)

    async def _be_excluded(self, chain: RotationChain) -> None:
        if self.exclusion is not None and self.exclusion.standing_of(chain) is not Standing.NEWER:
            return
        await asyncio.to_thread(self._files.store_exclusion, self.key, chain)
        self.exclusion = chain
        log.warning("%s: %s", SELF_EXCLUDED, title(chain.last))
        self.on_excluded()


async def _completed(change: Coroutine[Any, Any, None]) -> None:
    """Make a change of what is stored and used, to its end. Cancel: only when the change is made.

    A connection on which a rotation is heard has a time limit, and a disk may be slower. If the change were given up there, the
    thread would write on, the key that is stored would not be the one that is used, and a later rotation could be written before.
    """
    task = asyncio.ensure_future(change)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled


def title(record: RotationRecord | None) -> str:
    """Describe a rotation for people: its number and date."""
    if record is None:
        return "rotation 0"
    return f"rotation {record.generation} of {datetime.fromtimestamp(record.at, UTC):%Y-%m-%d %H:%M} UTC"
