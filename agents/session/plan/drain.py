"""Draining: a peer takes no new work, and waits until the sessions that run on it have ended or moved away."""

from collections.abc import Callable
from dataclasses import dataclass
from logging import getLogger

from meshd.agents.links.links import Links
from meshd.clock import Clock
from meshd.errors import PeerFault
from meshd.protocol.messages import Drain, Drained
from meshd.types import PeerId

log = getLogger(__name__)

_POLL_S = 0.05
_MAX_WAIT_S = 3600.0
_REPLY_S = 5.0
"""Time for the reply to arrive, on top of the wait that the request asks for."""


@dataclass(slots=True)
class Drainer:
    """Owns this peer's drain state, and asks other peers to drain."""

    links: Links
    clock: Clock
    stages: Callable[[], int]
    """Returns how many stages of running sessions are on this peer, whichever peer coordinates them."""
    on_change: Callable[[], None]
    """Called when the drain state, which is part of the advert, has changed."""
    leaving: bool = False
    """Whether the daemon is stopping. It then takes no new requests either."""
    _drain_requested: bool = False

    def register(self) -> None:
        """Register the handler of DRAIN."""
        self.links.register(Drain, self._on_drain)

    @property
    def draining(self) -> bool:
        """Whether this peer takes no new stages. Coordinators see this in its advert and move their stages away."""
        return self._drain_requested or self.leaving

    async def drain(self, peer: PeerId, undo: bool, timeout_s: float) -> int:
        """Ask a peer, which may be this peer, to drain, and wait until it has done so; with `undo`, ask it to take work again.

        Returns: number of stages that still run there; more than 0 only with `undo` or when `timeout_s` has passed.
        Raises: PeerLost, RemoteFailure.
        """
        timeout_s = min(timeout_s, _MAX_WAIT_S)
        request = Drain(request=self.links.next_request(), deadline_ms=int(timeout_s * 1000), undo=undo)
        reply, _ = await self.links.request(peer, request, timeout_s=timeout_s + _REPLY_S)
        if not isinstance(reply, Drained):
            raise PeerFault(f"DRAIN was answered with {type(reply).__name__}")
        return reply.sessions_left

    async def leave(self, timeout_s: float, on_waiting: Callable[[str], None], *, answers: Callable[[], int]) -> None:
        """Take no new work, and wait until nothing runs on this peer or `timeout_s` has passed.

        on_waiting: called with one line of text that says what this peer waits for; not called if nothing runs.
        answers: returns how many running answers this peer coordinates.
        """
        self.leaving = True

        def running() -> str:
            return _counted((answers(), "answer"), (self.stages(), "stage"))

        if not running() or timeout_s <= 0:
            return
        self.on_change()
        began = self.clock.monotonic()
        text = f"waiting up to {timeout_s:g} s for {running()} to end or move away"
        log.info("%s", text)
        on_waiting(text)
        await self._until(lambda: not running(), began + timeout_s)
        left = running()
        log.info("leaving after %.1f s: %s", self.clock.monotonic() - began, f"{left} cut off" if left else "nothing runs here now")

    async def _on_drain(self, sender: PeerId, message: Drain, payload: memoryview) -> Drained:
        requested = not message.undo
        if requested != self._drain_requested:
            self._drain_requested = requested
            log.info("%.8s asks this peer to %s", sender, "drain" if requested else "take work again")
            self.on_change()
        if requested:
            until = self.clock.monotonic() + min(message.deadline_ms / 1000, _MAX_WAIT_S)
            await self._until(lambda: not self.stages() or not self._drain_requested, until)
        return Drained(request=message.request, sessions_left=self.stages())

    async def _until(self, done: Callable[[], bool], until: float) -> None:
        while not done() and self.clock.monotonic() < until:
            await self.clock.sleep(_POLL_S)


def _counted(*counts: tuple[int, str]) -> str:
    """Returns: text like "1 answer and 2 stages"; empty if all counts are 0."""
    return " and ".join(f"{count} {what}{'s' if count > 1 else ''}" for count, what in counts if count)
