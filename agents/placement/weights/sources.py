"""Finds the peers that have weights of a model (its sources), and the manifest that most of them agree on."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from logging import DEBUG, INFO, getLogger

from meshd.agents.links.links import Links
from meshd.clock import Clock
from meshd.errors import MeshdError, ModelFileError, NoPeer, NotReady, PeerLost, ProtocolViolation, RemoteFailure, UnknownModel
from meshd.models.files.manifest import Offer, decode_offer
from meshd.models.store.partial_copy import CopyInfo
from meshd.protocol.messages import FetchManifest, ManifestData
from meshd.types import Advert, LinkStats, ModelId, PeerId

log = getLogger(__name__)

MAX_SOURCES = 8
"""Maximum number of sources of one fetch: peers with the whole file first, then peers with layers, each by bandwidth."""
_ANSWER_S = 10.0
_RETRY_S = 0.3
"""Interval between requests to a source while it hashes its file."""
_HASHING_S = 900.0
"""Longest time that a source may take to hash its file."""
_GRACE_S = 2.0
"""How long to wait for answers of other sources after the first answer."""
_BAN_S = 600.0
_MAX_NAME = 1024


@dataclass(frozen=True, slots=True)
class SourceAnswer:
    """The parts of a model that one source has, and its manifest."""

    offer: Offer
    about: CopyInfo
    digest: str
    """Hash of the manifest."""


@dataclass(slots=True)
class WeightSources:
    """Lists the possible sources of a model, asks them for manifests, and bans those that sent wrong data."""

    me: PeerId
    links: Links
    adverts: Callable[[], Iterable[Advert]]
    """Returns the adverts of the live peers. This peer's own advert may be among them, and is ignored."""
    names: Callable[[PeerId], str]
    clock: Clock
    link_stats: Callable[[], dict[PeerId, LinkStats]]
    _banned: dict[PeerId, float] = field(default_factory=dict)

    def candidates(self, model: ModelId, *, everyone: bool = False) -> list[PeerId]:
        """List up to `MAX_SOURCES` peers: those with the model's file, then those with its layers, each group by bandwidth to here.

        With `everyone`, all other live peers follow, because their disks may have tensors that they have not loaded.
        """
        known = {advert.peer: advert for advert in self.adverts() if advert.peer != self.me and not self.is_banned(advert.peer)}
        whole = {peer for peer, advert in known.items() if any(card.id == model for card in advert.models)}
        part = {peer for peer, advert in known.items() if any(holding.model == model for holding in advert.holdings)}

        def rank(peer: PeerId) -> tuple[bool, bool, float]:
            return peer not in whole, peer not in part, -self._bandwidth(known[peer])

        return sorted(known if everyone else whole | part, key=rank)[:MAX_SOURCES]

    def _bandwidth(self, advert: Advert) -> float:
        """Returns: bytes/s from a peer to this one as that peer measured it, or else in the other direction; 0 if unmeasured."""
        stats = advert.links.get(self.me) or self.link_stats().get(advert.peer)
        return stats.bandwidth_bytes_s if stats is not None else 0.0

    def ban(self, peer: PeerId, why: str) -> None:
        """Stop using a peer as a source for `_BAN_S`, because the peer sent wrong data."""
        log.warning("%s (%.8s) is not asked for weights any more: %s", self.names(peer), peer, why)
        self._banned[peer] = self.clock.monotonic() + _BAN_S

    def is_banned(self, peer: PeerId) -> bool:
        until = self._banned.get(peer)
        if until is not None and until < self.clock.monotonic():
            del self._banned[peer]
            return False
        return until is not None

    async def ask(self, peer: PeerId, model: ModelId) -> SourceAnswer:
        """Ask a source for its manifest and which parts it has, and wait while it hashes its file.

        Raises: PeerFault, Overloaded; ModelFileError if the manifest is invalid.
        """
        until = self.clock.monotonic() + _HASHING_S
        while True:
            request = FetchManifest(request=self.links.next_request(), model=model)
            try:
                reply, payload = await self.links.request(peer, request, timeout_s=_ANSWER_S)
                break
            except RemoteFailure as error:
                if error.remote_code != NotReady.code:
                    raise
                if self.clock.monotonic() > until:
                    raise PeerLost(f"{self.names(peer)} is not ready to give weights after {_HASHING_S:g} s") from error
            await self.clock.sleep(_RETRY_S)
        if not isinstance(reply, ManifestData) or reply.card.id != model or sha256(payload).hexdigest() != reply.sha256:
            raise ProtocolViolation("the manifest does not match its hash, or is of another model")
        offer = await asyncio.to_thread(decode_offer, payload)
        card = reply.card
        about = CopyInfo(model, card.name[:_MAX_NAME], card.ref[:_MAX_NAME], card.created, offer.manifest)
        return SourceAnswer(offer, about, offer.manifest.digest)

    async def agreed(self, model: ModelId) -> tuple[CopyInfo, frozenset[PeerId]]:
        """Choose the manifest that most peers with the whole file sent. Peers with a partial copy only decide between equal votes.

        Sources that sent another manifest are banned.

        Returns: the data to begin a partial copy with, which includes the manifest, and the sources that sent this manifest.
        Raises: NoPeer if no source answers; ModelFileError on a tie.
        """
        answers = await self._ask_all(model, self.candidates(model))
        if not answers:
            answers = await self._ask_all(model, self.candidates(model, everyone=True))
        if not answers:
            raise NoPeer("no live peer can give the model's weights")
        votes: dict[str, tuple[int, int]] = {}
        for answer in answers.values():
            whole, part = votes.get(answer.digest, (0, 0))
            votes[answer.digest] = (whole + 1, part) if answer.offer.have is None else (whole, part + 1)
        best, *others = sorted(votes, key=votes.__getitem__, reverse=True)
        if others and votes[others[0]] == votes[best]:
            peers = ", ".join(sorted(map(self.names, answers)))
            raise ModelFileError(f"{peers} do not agree on the model's tensors, and neither side has a majority")
        for peer, answer in answers.items():
            if answer.digest != best:
                self.ban(peer, "its list of the model's tensors differs from that of the majority")
        agreeing = {peer: answer.about for peer, answer in answers.items() if answer.digest == best}
        return next(iter(agreeing.values())), frozenset(agreeing)

    async def _ask_all(self, model: ModelId, peers: list[PeerId]) -> dict[PeerId, SourceAnswer]:
        """Ask all peers at once. Returns: the answers until `_GRACE_S` after the first one, in the order of `peers`."""
        loop = asyncio.get_running_loop()
        asked = {loop.create_task(self._try(peer, model), name=f"ask {peer:.8} for weights"): peer for peer in peers}
        answers: dict[PeerId, SourceAnswer] = {}
        pending = set(asked)
        until: float | None = None
        try:
            while pending and (until is None or self.clock.monotonic() < until):
                wait_s = None if until is None else until - self.clock.monotonic()
                done, pending = await asyncio.wait(pending, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                answers |= {asked[task]: answer for task in done if (answer := task.result()) is not None}
                if answers and until is None:
                    until = self.clock.monotonic() + _GRACE_S
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        return {peer: answers[peer] for peer in peers if peer in answers}

    async def _try(self, peer: PeerId, model: ModelId) -> SourceAnswer | None:
        try:
            return await self.ask(peer, model)
        except ModelFileError as error:
            self.ban(peer, str(error))
        except MeshdError as error:
            self.log_refusal(peer, error)
        return None

    def log_refusal(self, peer: PeerId, error: MeshdError) -> None:
        """Log that a source failed. If it has nothing of the model, the line has level DEBUG."""
        nothing = isinstance(error, RemoteFailure) and error.remote_code == UnknownModel.code
        log.log(DEBUG if nothing else INFO, "%s (%.8s) gives no more weights: %s", self.names(peer), peer, error)
