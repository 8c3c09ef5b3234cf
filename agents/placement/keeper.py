"""Keeps models placed while peers come and go. Every peer watches, the one with the smallest id acts; PLACE is idempotent, so that
two who act at once do no harm, and a leader that does nothing, or has only just started, is soon stood in for.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from logging import getLogger

from meshd.agents.links.links import Links
from meshd.agents.placement.client import request_place
from meshd.agents.placement.policy import ClusterState, HoldingHistory, LoadRequest, decide, grow, orphaned_copies
from meshd.clock import Clock
from meshd.errors import MeshdError
from meshd.protocol.messages import Unplace
from meshd.types import Advert, ModelCard, ModelId, PeerId

log = getLogger(__name__)

_LOOK_S = 2.0
_GATHER_S = 1.0
"""What comes with a change, like the adverts of others that saw it, is waited for."""
_STAND_IN_S = 6.0
"""A request that stays unmet for so long is asked for by the next peer in line too."""
_GROW_S = 10.0
_AT_ONCE = 8
_LET_GO_S = 10.0
_BACK_OFF_S = 5.0
_LONGEST_BACK_OFF_S = 300.0


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A peer could not load something of a model."""

    times: int
    until: float


@dataclass(slots=True, kw_only=True)
class Keeper:
    """Owns what this peer asks of others for the mesh's sake."""

    me: PeerId
    links: Links
    adverts: Callable[[], list[Advert]]
    """Of the live peers, this one's too."""
    suspects: Callable[[], list[Advert]]
    cards: Callable[[], Mapping[ModelId, ModelCard]]
    names: Callable[[PeerId], str]
    clock: Clock
    copies: int
    _history: HoldingHistory = field(default_factory=HoldingHistory)
    _wanted: dict[LoadRequest, float] = field(default_factory=dict)
    """Since when; until it is met."""
    _asked: dict[LoadRequest, "asyncio.Task[None]"] = field(default_factory=dict)
    _refusals: dict[tuple[PeerId, ModelId], _Refusal] = field(default_factory=dict)
    _grown: dict[ModelId, frozenset[PeerId]] = field(default_factory=dict)
    """Peers that were there when a model's placement was last compared with a new one."""
    _compared: dict[ModelId, float] = field(default_factory=dict)
    _told: tuple[str, ...] = ()
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, advert: Advert) -> None:
        """A peer tells what it holds."""
        self._history.note(advert)

    def changed(self) -> None:
        """Somebody came or went: look soon."""
        self._changed.set()

    async def run(self) -> None:
        """Look around every few seconds. Cancel: loads that were asked for go on where they are."""
        try:
            while True:
                await self._rest()
                try:
                    await self._look()
                except Exception:
                    log.exception("keeping models placed failed")
        finally:
            for task in self._asked.values():
                task.cancel()
            await asyncio.gather(*self._asked.values(), return_exceptions=True)

    async def _rest(self) -> None:
        try:
            async with asyncio.timeout(_LOOK_S):
                await self._changed.wait()
        except TimeoutError:
            return
        await self.clock.sleep(_GATHER_S)
        self._changed.clear()

    async def _look(self) -> None:
        alive, suspects, cards, now = self.adverts(), self.suspects(), self.cards(), self.clock.monotonic()
        self._history.look([*alive, *suspects])
        self._refusals = {key: refusal for key, refusal in self._refusals.items() if now < refusal.until + _LONGEST_BACK_OFF_S}
        in_line = sorted(advert.peer for advert in alive if not advert.draining)
        if self.me not in in_line:
            self._wanted.clear()
            return
        mesh = ClusterState(
            adverts=[*alive, *suspects],
            cards=cards,
            lost={model: frozenset(pieces) for model, pieces in self._history.lost.items()},
            let_go=frozenset(self._history.let_go),
            suspects=frozenset(advert.peer for advert in suspects),
            refused=frozenset(key for key, refusal in self._refusals.items() if now < refusal.until),
            pending=tuple(self._asked),
            copies=self.copies,
        )
        decision = await asyncio.to_thread(decide, mesh)
        self._tell(decision.missing)
        self._wanted = {request: self._wanted.get(request, now) for request in decision.requests}
        rank = in_line.index(self.me)
        for request, since in self._wanted.items():
            if now - since >= rank * _STAND_IN_S:
                self._ask(request, cards[request.model])
        if rank == 0:
            await self._let_go(alive)
            await self._grow(alive, cards, now)

    def _tell(self, missing: tuple[str, ...]) -> None:
        for text in missing:
            if text not in self._told:
                log.warning("%s", text)
        self._told = missing

    # Loads

    def _ask(self, request: LoadRequest, card: ModelCard) -> None:
        if request not in self._asked and len(self._asked) < _AT_ONCE:
            task = asyncio.get_running_loop().create_task(self._place(request, card), name=f"keep {request.layers}")
            self._asked[request] = task
            task.add_done_callback(lambda _: self._asked.pop(request, None))

    async def _place(self, request: LoadRequest, card: ModelCard) -> None:
        what = f"{'a copy of ' if request.standby else ''}layers {request.layers} of {card.name} on {self.names(request.peer)}"
        log.info("asking for %s", what)
        key = request.peer, request.model
        try:
            await request_place(
                self.links, request.peer, card, request.layers, request.kv_tokens, standby=request.standby, pinned=request.pinned
            )
        except MeshdError as error:
            times = self._refusals[key].times if key in self._refusals else 0
            wait_s = min(_LONGEST_BACK_OFF_S, _BACK_OFF_S * 2**times)
            self._refusals[key] = _Refusal(times + 1, self.clock.monotonic() + wait_s)
            log.warning("no %s: %s; it is asked again in %g s at the earliest", what, error.message, wait_s)
        else:
            self._refusals.pop(key, None)
        self.changed()

    async def _let_go(self, alive: list[Advert]) -> None:
        for peer, model in orphaned_copies(alive, self._history.let_go):
            try:
                await self.links.request(peer, Unplace(request=self.links.next_request(), model=model), timeout_s=_LET_GO_S)
            except MeshdError as error:
                log.info("%s keeps its copy of a model that was unplaced: %s", self.names(peer), error.message)

    # Growth

    async def _grow(self, alive: list[Advert], cards: Mapping[ModelId, ModelCard], now: float) -> None:
        """Place a model anew where a peer joined that makes it faster."""
        busy = {request.model for request in (*self._asked, *self._wanted)} | self._history.lost.keys() | self._history.let_go
        active = {held.model for advert in alive for held in advert.holdings if held.state == "active"}
        self._grown = {model: peers for model, peers in self._grown.items() if model in active}
        self._compared = {model: at for model, at in self._compared.items() if model in active}
        for model in sorted(active & cards.keys() - busy):
            peers = _measured(alive, model)
            known = self._grown.get(model, frozenset()) & peers
            if known == peers:
                self._grown[model] = known
            elif now - self._compared.get(model, float("-inf")) >= _GROW_S:
                self._grown[model], self._compared[model] = peers, now
                requests = await asyncio.to_thread(grow, cards[model], [advert for advert in alive if advert.peer in peers])
                if requests:
                    log.info("%s is predicted to be faster with another placement", cards[model].name)
                for request in requests:
                    self._ask(request, cards[model])


def _measured(adverts: list[Advert], model: ModelId) -> frozenset[PeerId]:
    """The peers that know their links with all who hold a model: before that nobody can tell what they are good for."""
    holders = {advert.peer for advert in adverts if any(held.model == model for held in advert.holdings)}
    return frozenset(advert.peer for advert in adverts if not advert.draining and holders <= {advert.peer, *advert.links})
