"""Leaving in good order: this peer takes no new work, and what runs on it ends or moves away before it goes."""

from collections.abc import Callable
from dataclasses import dataclass
from logging import getLogger

from meshd.agents.links.links import Links
from meshd.clock import Clock
from meshd.errors import PeerFault
from meshd.protocol.messages import Drain, Drained
from meshd.types import PeerId

log = getLogger(__name__)

_LOOK_S = 0.05
_LONGEST_S = 3600.0
_REPLY_S = 5.0
"""What a reply may take beside the wait that was asked for."""


@dataclass(slots=True)
class Drainer:
    """Owns whether this peer drains, and asks others to."""

    links: Links
    clock: Clock
    stages: Callable[[], int]
    """Of running sessions on this peer, whoever coordinates them."""
    answers: Callable[[], int]
    """Running ones that this peer coordinates."""
    on_change: Callable[[], None]
    """The advert tells another thing now."""
    leaving: bool = False
    """The daemon is told to stop: it takes no new requests either."""
    _asked: bool = False

    def register(self) -> None:
        """Take DRAIN from the links."""
        self.links.register(Drain, self._on_drain)

    @property
    def draining(self) -> bool:
        """No new stages here; coordinators that see it in the advert move theirs away."""
        return self._asked or self.leaving

    async def drain(self, peer: PeerId, undo: bool, timeout_s: float) -> int:
        """Have a peer (this one too) drain, or take work again; stages that still run there when it has, or at the time-out.

        Raises: PeerLost, RemoteFailure.
        """
        timeout_s = min(timeout_s, _LONGEST_S)
        request = Drain(request=self.links.next_request(), deadline_ms=int(timeout_s * 1000), undo=undo)
        reply, _ = await self.links.request(peer, request, timeout_s=timeout_s + _REPLY_S)
        if not isinstance(reply, Drained):
            raise PeerFault(f"DRAIN was answered with {type(reply).__name__}")
        return reply.sessions_left

    async def leave(self, timeout_s: float, tell: Callable[[str], None]) -> None:
        """Until nothing runs here any more, or the time is over. `tell` hears what is waited for."""
        self.leaving = True
        if not self._waits_for() or timeout_s <= 0:
            return
        self.on_change()
        began = self.clock.monotonic()
        text = f"waiting up to {timeout_s:g} s for {self._waits_for()} to end or move away"
        log.info("%s", text)
        tell(text)
        await self._until(lambda: not self._waits_for(), began + timeout_s)
        left = self._waits_for()
        log.info("leaving after %.1f s: %s", self.clock.monotonic() - began, f"{left} cut off" if left else "nothing runs here now")

    def _waits_for(self) -> str:
        """In words; empty if nothing runs."""
        parts = [(self.answers(), "answer"), (self.stages(), "stage")]
        running = [f"{count} {what}{'s' if count > 1 else ''}" for count, what in parts if count]
        return " and ".join(running)

    async def _on_drain(self, sender: PeerId, message: Drain, payload: memoryview) -> Drained:
        asked = not message.undo
        if asked != self._asked:
            self._asked = asked
            log.info("%.8s asks this peer to %s", sender, "drain" if asked else "take work again")
            self.on_change()
        if asked:
            until = self.clock.monotonic() + min(message.deadline_ms / 1000, _LONGEST_S)
            await self._until(lambda: not self.stages() or not self._asked, until)
        return Drained(request=message.request, sessions_left=self.stages())

    async def _until(self, done: Callable[[], bool], until: float) -> None:
        while not done() and self.clock.monotonic() < until:
            await self.clock.sleep(_LOOK_S)
