"""The cluster key of a simulated peer, which stays the same after a restart."""

from dataclasses import dataclass, field
from typing import Any, cast

from meshd.agents.trust.known_peers import KnownPeers
from meshd.agents.trust.trust import Trust
from meshd.clock import Clock
from meshd.protocol.cluster_key import ClusterKey
from meshd.protocol.identity import Identity
from meshd.protocol.owner import OwnerKey
from meshd.protocol.trust import RotationChain
from meshd.state import MemoryFolder
from meshd.types import PeerId


@dataclass
class SimTrustFiles:
    """Implements `TrustFiles` in memory."""

    key: ClusterKey
    chain: RotationChain
    exclusion: tuple[ClusterKey, RotationChain] | None = None
    known: MemoryFolder = field(default_factory=MemoryFolder)

    def store(self, key: ClusterKey, chain: RotationChain) -> Identity:
        self.key, self.chain = key, chain
        return cast("Identity", cast("Any", key))  # `SimLinks` needs no more of an identity than its key

    def store_exclusion(self, key: ClusterKey, chain: RotationChain) -> None:
        self.exclusion = key, chain

    def store_owner(self, founder: bytes, key: OwnerKey) -> None:
        raise NotImplementedError

    def load(self, me: PeerId, clock: Clock) -> Trust:
        """Load what the peer knew when it ran last."""
        excluded = self.exclusion[1] if self.exclusion is not None and self.exclusion[0] == self.key else None
        known = KnownPeers(self.known, clock)
        return Trust(me, self.key, self.chain, self, known, exclusion=excluded)
