"""Keeps models placed while peers come and go: asks peers to load the layers that `replication.py` chooses.

Every peer runs a keeper. The live peer with the smallest id is the leader and sends the requests. If a request stays unmet, the
peer with the next larger id sends it too. Several leaders at once do no harm, because PLACE is idempotent.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from logging import getLogger

from meshd.agents.links.links import Links
from meshd.agents.placement.client import UNPLACE_S, numerics_of_peer, request_place, request_unplace
from meshd.agents.placement.history import HoldingHistory
from meshd.agents.placement.replication import ClusterState, LoadRequest, decide, grow, orphaned_copies
from meshd.agents.placement.restart.placements import Placements, placed_anew, restored_though_unplaced
from meshd.clock import Clock
from meshd.errors import MeshdError
from meshd.state import MemoryFolder
from meshd.types import Advert, ModelCard, ModelId, PeerId

log = getLogger(__name__)

_CHECK_S = 2.0
_GATHER_S = 1.0
"""Delay of a check after a peer came or went, so that the adverts of other peers that noticed it arrive before the check."""
_STAND_IN_S = 6.0
"""How long a request may stay unmet before the peer with the next larger id sends it too."""
_GROW_S = 10.0
"""Shortest time between two searches for a faster placement of one model."""
_MAX_ASKED = 8
_BACK_OFF_S = 5.0
_LONGEST_BACK_OFF_S = 300.0


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Records that a peer could not load layers of a model, and how many times in a row."""

    times: int
    until: float
    """The peer is not asked for this model again before this time."""


@dataclass(slots=True, kw_only=True)
class Keeper:
    """Decides regularly which layers are to be loaded, and owns the requests that this peer sends for it."""

    me: PeerId
    links: Links
    adverts: Callable[[], list[Advert]]
    """Returns the adverts of all live peers, this one included."""
    suspects: Callable[[], list[Advert]]
    cards: Callable[[], Mapping[ModelId, ModelCard]]
    names: Callable[[PeerId], str]
    clock: Clock
    copies: int
    placements: Placements = field(default_factory=lambda: Placements(MemoryFolder()))
    _history: HoldingHistory = field(default_factory=HoldingHistory)
    _wanted: dict[LoadRequest, float] = field(default_factory=dict)
    """Unmet requests, each with the time when it was first found to be unmet."""
    _asked: dict[LoadRequest, "asyncio.Task[None]"] = field(default_factory=dict)
    """Requests that this peer has sent and that are not answered yet."""
    _refusals: dict[tuple[PeerId, ModelId], _Refusal] = field(default_factory=dict)
    _compared_peers: dict[ModelId, frozenset[PeerId]] = field(default_factory=dict)
    """The peers that took part in the last search for a faster placement of the model."""
    _compared_at: dict[ModelId, float] = field(default_factory=dict)
    _told_at: dict[tuple[ModelId, int], float] = field(default_factory=dict)
    """When each entry of `placements.unplaced` was first seen."""
    _logged: tuple[str, ...] = ()
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, advert: Advert) -> None:
        """Record an advert that has just arrived."""
        self._history.note(advert)

    def changed(self) -> None:
        """Check soon, because a peer came or went."""
        self._changed.set()

    async def run(self) -> None:
        """Check every `_CHECK_S`, and soon after a peer came or went. Cancel: peers finish the loads that they were asked for."""
        try:
            while True:
                await self._wait()
                try:
                    await self._check()
                except Exception:
                    log.exception("checking the placement of models failed; the next check is in %g s", _CHECK_S)
        finally:
            for task in self._asked.values():
                task.cancel()
            await asyncio.gather(*self._asked.values(), return_exceptions=True)

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(_CHECK_S):
                await self._changed.wait()
        except TimeoutError:
            return
        await self.clock.sleep(_GATHER_S)
        self._changed.clear()

    async def _check(self) -> None:
        alive, suspects, cards, now = self.adverts(), self.suspects(), self.cards(), self.clock.monotonic()
        self._history.update([*alive, *suspects])
        self._refusals = {key: refusal for key, refusal in self._refusals.items() if now < refusal.until + _LONGEST_BACK_OFF_S}
        in_line = sorted(advert.peer for advert in alive if not advert.draining)
        if self.me not in in_line:
            self._wanted.clear()
            return
        cluster = ClusterState(
            adverts=[*alive, *suspects],
            cards=cards,
            lost={model: frozenset(lost) for model, lost in self._history.lost.items()},
            unplaced=frozenset(self._history.unplaced | self._being_unplaced(now)),
            suspects=frozenset(advert.peer for advert in suspects),
            refused=frozenset(key for key, refusal in self._refusals.items() if now < refusal.until),
            pending=tuple(self._asked),
            copies=self.copies,
        )
        decision = await asyncio.to_thread(decide, cluster)
        # A model may have been unplaced during the decision, and would come back.
        self._history.update([*self.adverts(), *self.suspects()])
        unplaced = self._history.unplaced | self._being_unplaced(now)
        requests = [request for request in decision.requests if request.model not in unplaced]
        self._log_missing(decision.missing)
        self._wanted = {request: self._wanted.get(request, now) for request in requests}
        rank = in_line.index(self.me)
        for request, since in self._wanted.items():
            if now - since >= rank * _STAND_IN_S:
                self._ask(request, cards[request.model])
        if rank == 0:
            await self._unplace_orphans(alive)
        await self._unplace_restored(alive, now)
        if rank == 0:
            await self._grow(alive, cards, now)

    def _being_unplaced(self, now: float) -> set[ModelId]:
        """Return the models that this peer was told to unplace so lately that others may not have done so yet.

        Some peers have unloaded such a model and others have not, which looks like a loss.
        """
        self._told_at = {entry: self._told_at.get(entry, now) for entry in self.placements.unplaced.items()}
        return {model for (model, _), told_at in self._told_at.items() if now - told_at < UNPLACE_S}

    def _log_missing(self, missing: tuple[str, ...]) -> None:
        for text in missing:
            if text not in self._logged:
                log.warning("%s", text)
        self._logged = missing

    def _ask(self, request: LoadRequest, card: ModelCard) -> None:
        if request not in self._asked and len(self._asked) < _MAX_ASKED:
            task = asyncio.get_running_loop().create_task(self._place(request, card), name=f"keep {request.layers}")
            self._asked[request] = task
            task.add_done_callback(lambda _: self._asked.pop(request, None))

    async def _place(self, request: LoadRequest, card: ModelCard) -> None:
        what = f"{'a copy of ' if request.standby else ''}layers {request.layers} of {card.name} on {self.names(request.peer)}"
        log.info("asking for %s", what)
        key = request.peer, request.model
        try:
            await request_place(
                self.links,
                request.peer,
                card,
                request.layers,
                request.kv_tokens,
                numerics_of_peer(self.adverts(), request.peer),
                standby=request.standby,
                pinned=request.pinned,
            )
        except MeshdError as error:
            times = self._refusals[key].times if key in self._refusals else 0
            wait_s = min(_LONGEST_BACK_OFF_S, _BACK_OFF_S * 2**times)
            self._refusals[key] = _Refusal(times + 1, self.clock.monotonic() + wait_s)
            log.warning("could not place %s: %s; asking again in %g s at the earliest", what, error.message, wait_s)
        else:
            self._refusals.pop(key, None)
        self.changed()

    async def _unplace_orphans(self, alive: list[Advert]) -> None:
        for peer, model in orphaned_copies(alive, self._history.unplaced):
            await self._unplace(peer, model)

    async def _unplace_restored(self, alive: list[Advert], now: float) -> None:
        """Unplace what peers restored after a restart, though it was unplaced while they were off."""
        placed = placed_anew(alive, self.placements) - self._being_unplaced(now)
        for model in placed:
            self.placements.placed_elsewhere(model)
        if placed:
            await asyncio.to_thread(self.placements.save)
        for peer, model in restored_though_unplaced(alive, self.placements):
            await self._unplace(peer, model)

    async def _unplace(self, peer: PeerId, model: ModelId) -> None:
        try:
            await request_unplace(self.links, peer, model)
        except MeshdError as error:
            log.info("%s did not unload a model that was unplaced, asking again: %s", self.names(peer), error.message)

    async def _grow(self, alive: list[Advert], cards: Mapping[ModelId, ModelCard], now: float) -> None:
        """Search for a faster placement of each model for which new peers are `_measured`, and send the requests for it."""
        requested = {request.model for request in (*self._asked, *self._wanted)}
        busy = requested | self._history.lost.keys() | self._history.unplaced | self._being_unplaced(now)
        active = {holding.model for advert in alive for holding in advert.holdings if holding.state == "active"}
        self._compared_peers = {model: peers for model, peers in self._compared_peers.items() if model in active}
        self._compared_at = {model: at for model, at in self._compared_at.items() if model in active}
        for model in sorted(active & cards.keys() - busy):
            peers = _measured(alive, model)
            known = self._compared_peers.get(model, frozenset()) & peers
            if known == peers:
                self._compared_peers[model] = known
            elif now - self._compared_at.get(model, float("-inf")) >= _GROW_S:
                self._compared_peers[model], self._compared_at[model] = peers, now
                requests = await asyncio.to_thread(grow, cards[model], [advert for advert in alive if advert.peer in peers])
                if requests:
                    log.info("%s is predicted to be faster with another placement, which is loaded now", cards[model].name)
                for request in requests:
                    self._ask(request, cards[model])


def _measured(adverts: list[Advert], model: ModelId) -> frozenset[PeerId]:
    """Return the peers that have measured their links with all holders of a model, so that speed with them can be predicted."""
    holders = {advert.peer for advert in adverts if any(holding.model == model for holding in advert.holdings)}
    return frozenset(advert.peer for advert in adverts if not advert.draining and holders <= {advert.peer, *advert.links})
