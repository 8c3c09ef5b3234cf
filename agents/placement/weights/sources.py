"""Which peers have weights of a model, and what they say of it."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from logging import getLogger

from meshd.agents.links.links import Links
from meshd.clock import Clock
from meshd.errors import MeshdError, ModelFileError, NoPeer, NotReady, PeerLost, ProtocolViolation, RemoteFailure, UnknownModel
from meshd.models.files.manifest import Offer, decode_offer
from meshd.models.store.partial_copy import CopyInfo
from meshd.protocol.messages import FetchManifest, ManifestData
from meshd.types import Advert, LinkStats, ModelId, PeerId

log = getLogger(__name__)

MAX_SOURCES = 8
"""Asked at once: the complete ones, then those with the best links."""
_ANSWER_S = 10.0
_AGAIN_S = 0.3
_SUMS_S = 900.0
"""How long a source may take to hash its file."""
_GRACE_S = 2.0
"""Once one source has answered, how long the others may take to say the same."""
_BAN_S = 600.0
_MAX_NAME = 1024


@dataclass(frozen=True, slots=True)
class SourceAnswer:
    """One source's answer."""

    offer: Offer
    about: CopyInfo
    digest: str
    """Of the manifest."""


@dataclass(slots=True)
class WeightSources:
    """Knows who could give, asks them, and remembers who gave wrong bytes."""

    me: PeerId
    links: Links
    adverts: Callable[[], Iterable[Advert]]
    """Of the other live peers."""
    names: Callable[[PeerId], str]
    clock: Clock
    link_stats: Callable[[], dict[PeerId, LinkStats]]
    _banned: dict[PeerId, float] = field(default_factory=dict)

    def candidates(self, model: ModelId, *, everyone: bool = False) -> list[PeerId]:
        """Who has weights of it: peers with the file, then peers with layers, each by the bandwidth from there to here.

        `everyone`: then all others, which may have some on their disks.
        """
        known = {advert.peer: advert for advert in self.adverts() if advert.peer != self.me and not self.is_banned(advert.peer)}
        whole = {peer for peer, advert in known.items() if any(card.id == model for card in advert.models)}
        part = {peer for peer, advert in known.items() if any(held.model == model for held in advert.holdings)}

        def rank(peer: PeerId) -> tuple[bool, bool, float]:
            return peer not in whole, peer not in part, -self._bandwidth(known[peer])

        return sorted(known if everyone else whole | part, key=rank)[:MAX_SOURCES]

    def _bandwidth(self, advert: Advert) -> float:
        """From there to here as measured there, else as measured here the other way round."""
        stats = advert.links.get(self.me) or self.link_stats().get(advert.peer)
        return stats.bandwidth_bytes_s if stats is not None else 0.0

    def ban(self, peer: PeerId, why: str) -> None:
        """It gave what is wrong: it is not asked again for a while."""
        log.warning("%s (%.8s) is not asked for weights any more: %s", self.names(peer), peer, why)
        self._banned[peer] = self.clock.monotonic() + _BAN_S

    def is_banned(self, peer: PeerId) -> bool:
        until = self._banned.get(peer)
        if until is not None and until < self.clock.monotonic():
            del self._banned[peer]
            return False
        return until is not None

    async def ask(self, peer: PeerId, model: ModelId) -> SourceAnswer:
        """What a source has; waits while it hashes its file. Raises: PeerFault, Overloaded; ModelFileError if it makes no sense."""
        until = self.clock.monotonic() + _SUMS_S
        while True:
            question = FetchManifest(request=self.links.next_request(), model=model)
            try:
                reply, payload = await self.links.request(peer, question, timeout_s=_ANSWER_S)
                break
            except RemoteFailure as error:
                if error.remote_code != NotReady.code:
                    raise
                if self.clock.monotonic() > until:
                    raise PeerLost(f"{self.names(peer)} is not ready to give weights after {_SUMS_S:g} s") from error
            await self.clock.sleep(_AGAIN_S)
        if not isinstance(reply, ManifestData) or reply.card.id != model or sha256(payload).hexdigest() != reply.sha256:
            raise ProtocolViolation("the list of tensors arrived torn, or is of another model")
        offer = await asyncio.to_thread(decode_offer, payload)
        card = reply.card
        about = CopyInfo(model, card.name[:_MAX_NAME], card.ref[:_MAX_NAME], card.created, offer.manifest)
        return SourceAnswer(offer, about, offer.manifest.digest)

    async def agreed(self, model: ModelId) -> tuple[CopyInfo, frozenset[PeerId]]:
        """What a copy is to be made of, and who says so: complete peers count first, since the others only repeat.

        Raises: NoPeer if nobody has anything; ModelFileError if as many say one thing as another.
        """
        said = await self._ask_all(model, self.candidates(model))
        if not said:
            said = await self._ask_all(model, self.candidates(model, everyone=True))
        if not said:
            raise NoPeer("no live peer can give the model's weights")
        votes: dict[str, tuple[int, int]] = {}
        for one in said.values():
            whole, part = votes.get(one.digest, (0, 0))
            votes[one.digest] = (whole + 1, part) if one.offer.have is None else (whole, part + 1)
        best, *others = sorted(votes, key=votes.__getitem__, reverse=True)
        if others and votes[others[0]] == votes[best]:
            peers = ", ".join(sorted(map(self.names, said)))
            raise ModelFileError(f"{peers} do not agree on the model's tensors, and neither side is outvoted")
        for peer, one in said.items():
            if one.digest != best:
                self.ban(peer, "its list of the model's tensors is not that of the others")
        agreeing = {peer: one.about for peer, one in said.items() if one.digest == best}
        return next(iter(agreeing.values())), frozenset(agreeing)

    async def _ask_all(self, model: ModelId, peers: list[PeerId]) -> dict[PeerId, SourceAnswer]:
        """All answers that come within a short time of the first."""
        loop = asyncio.get_running_loop()
        asked = {loop.create_task(self._try(peer, model), name=f"ask {peer:.8} for weights"): peer for peer in peers}
        said: dict[PeerId, SourceAnswer] = {}
        pending = set(asked)
        until: float | None = None
        try:
            while pending and (until is None or self.clock.monotonic() < until):
                wait_s = None if until is None else until - self.clock.monotonic()
                done, pending = await asyncio.wait(pending, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                said |= {asked[task]: answer for task in done if (answer := task.result()) is not None}
                if said and until is None:
                    until = self.clock.monotonic() + _GRACE_S
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        return {peer: said[peer] for peer in peers if peer in said}

    async def _try(self, peer: PeerId, model: ModelId) -> SourceAnswer | None:
        try:
            return await self.ask(peer, model)
        except ModelFileError as error:
            self.ban(peer, str(error))
        except MeshdError as error:
            self.tell_refusal(peer, error)
        return None

    def tell_refusal(self, peer: PeerId, error: MeshdError) -> None:
        """A source gives nothing, or nothing more."""
        nothing = isinstance(error, RemoteFailure) and error.remote_code == UnknownModel.code
        log.log(10 if nothing else 20, "%s (%.8s) gives no more weights: %s", self.names(peer), peer, error)
