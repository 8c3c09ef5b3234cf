"""Reports the peers that the user lists with `--peer`."""

from collections.abc import Sequence

from meshd.agents.membership.sources import OnSighting, PeerFound
from meshd.clock import Clock
from meshd.values import Address


class StaticPeers:
    """The source of static addresses. Host names are reported unresolved, so that every dial resolves them again."""

    def __init__(self, peers: Sequence[Address], on_sighting: OnSighting, *, clock: Clock, every_s: float = 5.0) -> None:
        self._peers = tuple(peers)
        self._on_sighting = on_sighting
        self._clock = clock
        self._every_s = every_s

    async def run(self) -> None:
        """Report every peer now and again every `every_s` seconds, so that a lost peer is dialled again."""
        while True:
            for peer in self._peers:
                self._on_sighting(PeerFound(source="static", peer=None, addresses=(peer.host,), port=peer.port))
            await self._clock.sleep(self._every_s)
