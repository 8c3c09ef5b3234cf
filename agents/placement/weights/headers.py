"""Fetches the header of a model's file from peers. It contains the tokenizer and the chat template: what a model reads and writes.

A header is used only if its hash is that in the manifest on which the peers with the model agree (`sources.py`), so that one peer
alone can't give a model another template.
"""

from dataclasses import dataclass
from hashlib import sha256

from meshd.agents.links.links import Links
from meshd.agents.placement.weights.sources import WeightSources
from meshd.errors import MeshdError, NoPeer, PeerFault, ProtocolViolation
from meshd.models.store.partial_copy import HEADER_INDEX
from meshd.protocol.messages import FetchHeader, HeaderData
from meshd.types import ModelCard, ModelId, PeerId

_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class HeaderFetcher:
    """Asks the peers that sent the agreed manifest for the header, one after the other."""

    links: Links
    sources: WeightSources

    async def agreed_hash(self, model: ModelId) -> bytes:
        """Returns: the SHA-256 of the header on which the peers agree. Raises: what `WeightSources.agreed` raises."""
        about, _ = await self.sources.agreed(model)
        return about.manifest.parts[HEADER_INDEX].sha256

    async def fetch(self, card: ModelCard) -> bytes:
        """Fetch a header. A peer that sends another one than the agreed one is banned, and the next one is asked.

        Raises: NoPeer, PeerFault; ModelFileError if no majority of the peers agrees on the model's contents.
        """
        about, peers = await self.sources.agreed(card.id)
        expected = about.manifest.parts[HEADER_INDEX].sha256
        failure: MeshdError = NoPeer(f"no live peer has the file of {card.name}", hint=f"fetch it with `meshd pull {card.ref}`")
        for peer in [peer for peer in self.sources.candidates(card.id, everyone=True) if peer in peers]:
            try:
                data = await self._ask(peer, card)
            except PeerFault as error:
                failure = error
                continue
            if sha256(data).digest() == expected:
                return data
            failure = ProtocolViolation(f"{self.sources.names(peer)} sent another header of {card.name} than its peers agree on")
            self.sources.ban(peer, failure.message)
        raise failure

    async def _ask(self, peer: PeerId, card: ModelCard) -> bytes:
        request = FetchHeader(request=self.links.next_request(), model=card.id)
        reply, payload = await self.links.request(peer, request, timeout_s=_TIMEOUT_S)
        if not isinstance(reply, HeaderData):
            raise PeerFault(f"FETCH_HEADER was answered with {type(reply).__name__}")
        return bytes(payload)
