"""Broken links of the simulated network: they are dialled again at once, and restored or given up as `agents/links` does."""

from collections.abc import Callable

from meshd.agents.links.link_table import Timing
from meshd.agents.links.restoring.history import LinkHistory
from meshd.types import PeerId
from sim.loop import SimLoop
from sim.network.delivery import Delivery
from sim.network.links import SimLinks
from sim.network.wires import Link
from sim.trace import Trace

_AGAIN_S = 0.1
RESTORE_S = Timing().restore_s


class BrokenLinks:
    """Decides what becomes of the broken links of all peers. Each end of a link is its own: it may notice a break alone."""

    def __init__(
        self,
        loop: SimLoop,
        trace: Trace,
        ends: dict[PeerId, SimLinks],
        delivery: Delivery,
        delay_s: Callable[[PeerId, PeerId], float | None],
        blocked: Callable[[PeerId, PeerId], bool],
        dial: Callable[[SimLinks, SimLinks], float],
        lost: Callable[[SimLinks, PeerId, str], None],
    ) -> None:
        self._loop = loop
        self._trace = trace
        self._ends = ends
        self._delivery = delivery
        self._delay_s = delay_s
        self._blocked = blocked
        self._dial = dial
        self._lost = lost
        self._dialled_until: dict[frozenset[PeerId], float] = {}
        """When the latest dial between two peers has made a link, or failed."""

    def broke(self, end: SimLinks, other: PeerId, link: Link, reason: str) -> None:
        """Keep what is sent on a link that has ended at one side, and dial."""
        if link.histories[end.id].is_futile():
            self._lost(end, other, reason)
            return
        self._trace.note("broke", end.name, other[:4], reason)
        link.reason, end.broken[other] = reason, link
        self._loop.call_later(RESTORE_S, self._too_late, end, other, link, context=end.context)
        wait_s = 2 * (self._delay_s(end.id, other) or 0.0)
        self._loop.call_later(wait_s, self._try, end, other, link, context=end.context)

    def _try(self, end: SimLinks, other: PeerId, link: Link) -> None:
        if end.detached or end.broken.get(other) is not link:
            return
        far = self._ends.get(other)
        if far is None:
            self.give_up(end, other, f"{link.reason}, and nothing listens there any more")
        elif self._blocked(end.id, other) or self._blocked(other, end.id):
            self._loop.call_later(_AGAIN_S, self._try, end, other, link, context=end.context)
        else:
            pair, now = frozenset((end.id, other)), self._loop.time()
            if self._dialled_until.get(pair, 0.0) <= now:
                self._dialled_until[pair] = now + self._dial(end, far)
            self._loop.call_at(self._dialled_until[pair] + 1e-3, self._try, end, other, link, context=end.context)

    def _too_late(self, end: SimLinks, other: PeerId, link: Link) -> None:
        if not end.detached and end.broken.get(other) is link:
            self.give_up(end, other, link.reason)

    def give_up(self, end: SimLinks, other: PeerId, reason: str) -> None:
        """Give up a broken link, if there is one: the peer is lost."""
        link = end.broken.pop(other, None)
        if link is not None:
            self._call_waiting(end, link)
            self._lost(end, other, reason)

    def agree_on_history(self, link: Link, one: SimLinks, other: SimLinks) -> None:
        """Let a new link restore what both ends have of the link before, or give that up."""
        before = one.known(other.id), other.known(one.id)
        if before[0] is not None and before[1] is not None and before[0].histories is before[1].histories and before[0].restorable:
            link.histories, link.restores = before[0].histories, True
            for end, far in ((one, other), (other, one)):
                if (unaware := end.links.get(far.id)) is not None:
                    self._loop.call_soon(self._is_told, end, far.id, unaware, context=end.context)
            return
        link.histories = {end.id: LinkHistory(link.number) for end in (one, other)}
        for end, far in ((one, other), (other, one)):
            if far.id in end.broken:
                self._loop.call_soon(self.give_up, end, far.id, end.broken[far.id].reason, context=end.context)

    def _is_told(self, end: SimLinks, other: PeerId, link: Link) -> None:
        """End a link of which only the other side knew that it had broken."""
        if end.links.get(other) is link and not end.detached:
            link.ended.add(end.id)
            link.up.discard(end.id)
            del end.links[other]
            self._delivery.end(end.id, link)
            self.broke(end, other, link, "it has dialled again")

    def is_restored_by(self, end: SimLinks, other: PeerId, link: Link) -> bool:
        """Whether a peer still has the broken link that a new one restores."""
        broken = end.broken.get(other)
        return broken is not None and broken.histories is link.histories

    def restored(self, end: SimLinks, other: PeerId, link: Link) -> None:
        """Go on over a new link."""
        self._trace.note("restored", end.name, other[:4])
        broken = end.broken.pop(other)
        self._delivery.send_again(end.id, other, link)
        self._call_waiting(end, broken)

    def _call_waiting(self, end: SimLinks, link: Link) -> None:
        for callback in link.waiting.pop(end.id, []):
            self._loop.call_soon(callback, context=end.context)
