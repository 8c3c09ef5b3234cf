"""Brings links up and down, and applies the network's faults to them.

A link has two lanes in each direction, and each lane keeps the order of messages, as TCP does. Heartbeats are not sent: the network
knows whether they would arrive, and a peer that would miss them for 2 s ends the link. Messages that a cut holds back arrive when
the cut heals, if the link still exists. When a link breaks, the messages that would arrive after a random time are lost; a link
between the same processes takes its place soon, with the code of `agents/links/restoring/` (`breaks.py`).
"""

import asyncio
import contextvars
import random
from functools import partial

from meshd.agents.links.link_table import LEFT
from meshd.protocol.framing import MAX_HEADER, MAX_PAYLOAD
from meshd.protocol.messages import FEATURES, PROTOCOL_VERSION, Hello, Lane
from meshd.types import PeerId
from sim.loop import SimLoop
from sim.network.breaks import BrokenLinks
from sim.network.delivery import Delivery
from sim.network.links import SimLinks
from sim.network.returning import ReturnConnection, converse
from sim.network.wires import Link, Path, Pipe
from sim.trace import Trace

_SILENCE_S = 2.0
_BEAT_S = 0.5
_LATEST_REDIAL_S = 0.25
_KEY_REDIAL_S = 1.0
"""Pause after a conversation of two peers with different cluster keys."""
Pair = tuple[PeerId, PeerId]


class SimNetwork:
    """All paths and links of one simulated cluster."""

    def __init__(self, loop: SimLoop, rng: random.Random, trace: Trace) -> None:
        self._loop = loop
        self._rng = rng
        self._trace = trace
        self._paths: dict[Pair, Path] = {}
        self._ends: dict[PeerId, SimLinks] = {}
        """The `SimLinks` of each peer that is on the network."""
        self._redials: dict[Pair, asyncio.TimerHandle] = {}
        self._talking: set[Pair] = set()
        """Pairs of peers with different cluster keys that exchange rotations."""
        self._links = 0
        self.delivery = Delivery(loop, rng, trace, self._paths, self._ends)
        self._breaks = BrokenLinks(loop, trace, self._ends, self.delivery, self._delay_s, self._blocked, self._restore, self._lost)

    def path(self, source: PeerId, target: PeerId) -> Path:
        return self._paths[source, target]

    def set_path(self, source: PeerId, target: PeerId, path: Path) -> None:
        self._paths[source, target] = path

    def attach(self, end: SimLinks) -> None:
        """Add a peer to the network, and link it with the peers that it can reach."""
        self._ends[end.id] = end
        for other in self._ends:
            if other != end.id:
                self._unblock_if_reachable(other, end.id)
                self._unblock_if_reachable(end.id, other)
                self._redial(end.id, other)

    def detach(self, end: SimLinks, reason: str, *, silently: bool = False) -> None:
        """Remove a peer. With `silently` the others get no notice, as after a power cut."""
        if end.detached:
            return
        end.detached = True
        if self._ends.get(end.id) is end:
            del self._ends[end.id]
        for other, link in list(end.links.items()):
            if silently:
                self._block(end.id, other)
            else:
                self._notify_ended(end, other, link, reason, breaks=not reason.startswith(LEFT))
        end.links.clear()
        end.broken.clear()
        end.dispatcher.cancel_tasks()

    def freeze(self, peer: PeerId) -> None:
        """Stop the heartbeats of a peer, because its process is frozen."""
        for other in self._ends:
            if other != peer:
                self._block(peer, other)

    def thaw(self, peer: PeerId) -> None:
        """End a `freeze`."""
        for other in self._ends:
            if other != peer:
                self._unblock_if_reachable(peer, other)
                self._redial(peer, other)

    def cut(self, source: PeerId, target: PeerId) -> None:
        """Hold back everything from `source` to `target`, without notice to either side."""
        self._paths[source, target].cut = True
        self._block(source, target)

    def heal(self, source: PeerId, target: PeerId) -> None:
        """End a `cut`: the messages that were held back are sent on."""
        self._paths[source, target].cut = False
        self._unblock_if_reachable(source, target)
        self.delivery.release(source, target)
        self._redial(source, target)

    def break_link(self, one: PeerId, other: PeerId) -> None:
        """Reset the link: both sides notice, and messages that would arrive after a random time (at most 10 ms) are lost."""
        end = self._ends.get(one)
        link = end.links.get(other) if end is not None else None
        if end is None or link is None:
            return
        link.lost_after = min(link.lost_after, self._loop.time() + self._rng.random() * 0.01)
        self._loop.call_soon(partial(self._end, end, other, link, "connection reset", breaks=True), context=end.context)

    def break_lossy(self) -> None:
        """Reset the links on which a message was dropped."""
        for end in list(self._ends.values()):
            for other, link in list(end.links.items()):
                if link.lossy:
                    self.break_link(end.id, other)

    def silence_s(self, source: PeerId, target: PeerId) -> float:
        """Return for how many seconds no heartbeat of `source` has arrived at `target`. 0: heartbeats arrive."""
        since = self._paths[source, target].blocked_since
        return 0.0 if since is None else self._loop.time() - since

    def _blocked(self, source: PeerId, target: PeerId) -> bool:
        end = self._ends.get(source)
        return self._paths[source, target].cut or end is None or end.owner.stopped

    def _block(self, source: PeerId, target: PeerId) -> None:
        path = self._paths[source, target]
        if path.blocked_since is not None:
            return
        since = path.blocked_since = self._loop.time()
        listener = self._ends.get(target)
        if listener is not None:
            wait = _SILENCE_S + self._rng.random() * _BEAT_S
            self._loop.call_later(wait, self._give_up, listener, source, path, since, context=listener.context)

    def _unblock_if_reachable(self, source: PeerId, target: PeerId) -> None:
        if not self._blocked(source, target):
            self._paths[source, target].blocked_since = None

    def _give_up(self, listener: SimLinks, source: PeerId, path: Path, since: float) -> None:
        """End the link with `source` if nothing has arrived from `source` since time `since`."""
        link = listener.links.get(source)
        if path.blocked_since == since and link is not None and listener.id in link.up:
            self._end(listener, source, link, f"silent for {self._loop.time() - since:.1f} s")

    def end(self, end: SimLinks, other: PeerId, reason: str) -> None:
        """End a peer's link with another one on purpose."""
        link = end.links.get(other)
        if link is not None:
            self._end(end, other, link, reason, on_purpose=True)
        self._breaks.give_up(end, other, reason)

    def dial_all(self, end: SimLinks) -> None:
        """Dial all peers with which a peer has no link."""
        for other in self._ends:
            if other != end.id:
                self._redial(end.id, other)

    def _exchange_rotations(self, one: SimLinks, other: SimLinks) -> None:
        """Let two peers with different cluster keys talk, and dial again."""
        pair = (one.id, other.id)
        if pair in self._talking or one.desk is None or other.desk is None:
            return
        self._talking.add(pair)
        asking = ReturnConnection(self._loop, one, other.id, partial(self._delay_s, one.id, other.id))
        answering = ReturnConnection(self._loop, other, one.id, partial(self._delay_s, other.id, one.id))
        asking.far, answering.far = answering, asking
        self._loop.create_task(converse(answering, other.desk.answer), context=other.context)
        talk = self._loop.create_task(converse(asking, one.desk.ask), context=one.context)
        talk.add_done_callback(lambda _: self._talked(pair), context=contextvars.Context())

    def _talked(self, pair: Pair) -> None:
        self._talking.discard(pair)
        self._redial(*pair, later_s=_KEY_REDIAL_S)

    def _delay_s(self, source: PeerId, target: PeerId) -> float | None:
        return None if self._blocked(source, target) else self.delivery.delay_s(self._paths[source, target])

    def _redial(self, one: PeerId, other: PeerId, *, later_s: float = 0.0) -> None:
        pair = (one, other) if one < other else (other, one)
        if pair in self._redials:
            return
        wait = later_s + self._rng.random() * _LATEST_REDIAL_S
        self._redials[pair] = self._loop.call_later(wait, self._dial, *pair)

    def _dial(self, one: PeerId, other: PeerId) -> None:
        """Link two peers. If one can't reach the other, do nothing: `heal`, `thaw` or `attach` will dial again."""
        del self._redials[one, other]
        ends = self._ends.get(one), self._ends.get(other)
        if ends[0] is None or ends[1] is None or self._blocked(one, other) or self._blocked(other, one):
            return
        links = ends[0].links.get(other), ends[1].links.get(one)
        if (links[0] is not None and links[0] is links[1]) or other in ends[0].broken or one in ends[1].broken:
            return
        self._connect(ends[0], ends[1])

    def _restore(self, one: SimLinks, other: SimLinks) -> float:
        """Dial the peer of a broken link. Returns: seconds until the new link is up at both."""
        return self._connect(*sorted((one, other), key=lambda end: end.id))

    def _connect(self, *ends: SimLinks) -> float:
        one, other = ends[0].id, ends[1].id
        if ends[0].authority != ends[1].authority:
            self._exchange_rotations(ends[0], ends[1])
            return _KEY_REDIAL_S
        self._links += 1
        link = Link(self._links)
        self._breaks.agree_on_history(link, ends[0], ends[1])
        for source, target in ((one, other), (other, one)):
            for lane in Lane:
                link.pipes[source, lane] = Pipe()
            self._paths[source, target].measured = None
        there, back = self._paths[one, other], self._paths[other, one]
        ready_s = 2 * (there.delay_s * there.slow + back.delay_s * back.slow)
        # The dialler sends first, so the link comes up one delay later at the other peer.
        self._loop.call_later(ready_s + there.delay_s * there.slow, self._bring_up, ends[1], ends[0], link, context=ends[1].context)
        self._loop.call_later(ready_s, self._bring_up, ends[0], ends[1], link, context=ends[0].context)
        return ready_s + there.delay_s * there.slow

    def _bring_up(self, end: SimLinks, other: SimLinks, link: Link) -> None:
        if end.detached or link.ended or end.authority != other.authority:
            return
        if link.restores and not self._breaks.is_restored_by(end, other.id, link):
            link.ended.add(end.id)
            self._notify_ended(end, other.id, link, "it was given up", breaks=True)
            return
        old = end.links.get(other.id)
        if old is not None and old.number > link.number:
            return
        if old is not None:
            self._end(end, other.id, old, "it has dialled anew")
        end.links[other.id] = link
        link.up.add(end.id)
        if link.restores:
            self._breaks.restored(end, other.id, link)
            return
        self._trace.note("up", end.name, other.name)
        hello = Hello(
            version=PROTOCOL_VERSION,
            features=tuple(sorted(FEATURES)),
            software="meshd/sim",
            peer=other.id,
            name=other.name,
            incarnation=other.incarnation,
            link=link.number,
            lane=Lane.CONTROL,
            max_header=MAX_HEADER,
            max_payload=MAX_PAYLOAD,
            port=6375,
        )
        end.on_up(other.id, hello, (f"sim-{other.id[:8]}", 6375))

    def _end(
        self, end: SimLinks, other: PeerId, link: Link, reason: str, *, breaks: bool = False, on_purpose: bool = False
    ) -> None:
        """End the link at the peer of `end`, and notify the peer `other`.

        breaks: whether `end` may restore the link. `other` tries to, unless the link ends `on_purpose`.
        """
        if end.links.get(other) is not link:
            return
        self._notify_ended(end, other, link, "connection closed", breaks=not on_purpose)
        self._down(end, other, link, reason, breaks=breaks)

    def _notify_ended(self, end: SimLinks, other: PeerId, link: Link, reason: str, *, breaks: bool) -> None:
        """Notify the peer `other`, after every small message that was sent to it before has arrived. `breaks`: see `_end`."""
        link.ended.add(end.id)
        far = self._ends.get(other)
        if far is None or far.links.get(end.id) is not link:
            return
        if self._paths[end.id, other].cut:
            self._block(end.id, other)  # the notice can't arrive: `other` ends the link after the silence
            return
        # The control lane is closed at once: it does not wait for large messages on the bulk lane, which are lost.
        last = link.pipes[end.id, Lane.CONTROL].last_arrival
        delay_s = self.delivery.delay_s(self._paths[end.id, other])
        arrival = max(self._loop.time() + delay_s, min(last, link.lost_after)) + 1e-6
        self._loop.call_at(arrival, partial(self._down, far, end.id, link, reason, breaks=breaks), context=far.context)

    def _down(self, end: SimLinks, other: PeerId, link: Link, reason: str, *, breaks: bool) -> None:
        if end.detached or end.links.get(other) is not link:
            return
        link.ended.add(end.id)
        link.up.discard(end.id)
        del end.links[other]
        self.delivery.end(end.id, link)
        if breaks and link.restorable:
            self._breaks.broke(end, other, link, reason)
        else:
            self._lost(end, other, reason)

    def _lost(self, end: SimLinks, other: PeerId, reason: str) -> None:
        self._trace.note("down", end.name, other[:4], reason)
        end.dispatcher.peer_lost(other, reason)
        end.on_down(other, reason)
        self._redial(end.id, other)
