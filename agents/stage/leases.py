"""Decides how long a session's KV stays on this peer, and which coordinator controls the session."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from logging import getLogger

from meshd.agents.links.links import Links
from meshd.agents.links.rpc import try_send
from meshd.agents.observe.story import Story
from meshd.agents.stage.kv import KvManager, SessionKv
from meshd.agents.stage.preparing import PreparingStages
from meshd.agents.stage.runner import StageRunner
from meshd.clock import Clock
from meshd.errors import PeerLost, Superseded
from meshd.protocol.messages import Close, Closed, Failed, HandOver, Renew
from meshd.types import PeerId, SessionId

log = getLogger(__name__)

_MAX_LEASE_MS = 60_000
"""Longest lease granted; a longer one that a coordinator requests is shortened to this (SPEC.md, section 8)."""


@dataclass(slots=True)
class SessionLeases:
    """Renews, closes and expires the leases of the sessions that have KV on this peer."""

    me: PeerId
    links: Links
    clock: Clock
    story: Story
    kv_manager: KvManager
    runner: StageRunner
    preparing: PreparingStages
    may_coordinate: Callable[[PeerId, SessionId], bool]
    """See `StageHost.may_coordinate`."""
    on_change: Callable[[], None]

    def expiry(self, lease_ms: int) -> float:
        """Return when a lease granted now ends, in the clock's monotonic time."""
        return self.clock.monotonic() + min(lease_ms, _MAX_LEASE_MS) / 1000

    def check_coordinator(self, session_kv: SessionKv, coordinator: PeerId, epoch: int) -> None:
        """Check that this coordinator may start this epoch. `coordinator`: the peer at the other end of the link.

        A session has one coordinator at a time. Another peer takes over with a higher epoch, after the link with the current
        coordinator went down, also if that one is linked again: it may have restarted, and then knows nothing of the session. If it
        still coordinates the session, its next RENEW says so. (A coordinator that gives the session away says so itself:
        `on_hand_over`. It may have given it to this peer, which has not begun it, because its client has left.)

        Raises: Superseded if the epoch is past, or if another coordinator still controls the session.
        """
        if epoch < session_kv.epoch:
            raise Superseded(f"epoch {epoch} is past: session {session_kv.session} is in {session_kv.epoch}")
        present = session_kv.coordinator
        controls = not session_kv.orphaned and self.may_coordinate(present, session_kv.session)
        if coordinator != present and (epoch == session_kv.epoch or controls):
            raise Superseded(f"session {session_kv.session} has a coordinator that is alive: {present}")

    def begin_epoch(
        self, session: SessionId, coordinator: PeerId, epoch: int, predecessors: Collection[PeerId]
    ) -> SessionKv | None:
        """End the session's stages of older epochs, because its coordinator begins this one.

        KV from a coordinator that is neither this one nor one of its predecessors is dropped: that peer reserved memory under the
        session's id without being its coordinator.

        Returns: what is left of the session on this peer; None if nothing is.
        Raises: Superseded as `check_coordinator` does.
        """
        session_kv = self.kv_manager.get(session)
        if session_kv is None:
            return None
        self.check_coordinator(session_kv, coordinator, epoch)
        self.runner.end_before(session, epoch, "a new epoch")
        self.preparing.end_before(session, epoch, "a new epoch")
        if session_kv.coordinator not in (coordinator, *predecessors):
            log.warning("session %s: KV from %.8s, which never was its coordinator, is freed", session, session_kv.coordinator)
            self.kv_manager.drop_where(session_kv, lambda cache: True)
        return self.kv_manager.get(session)

    def on_hand_over(self, sender: PeerId, message: HandOver) -> bool:
        """Obey another coordinator from now on. Returns: whether `sender` was the session's coordinator."""
        session_kv = self.kv_manager.get(message.session)
        if session_kv is None or session_kv.coordinator != sender:
            return False
        session_kv.coordinator, session_kv.orphaned = message.to, False
        self.story.note(message.session, "handed over", coordinator=message.to)
        return True

    def on_renew(self, sender: PeerId, message: Renew, payload: memoryview) -> None:
        """Extend the session's lease, or report to the sender that this peer has no KV of the session."""
        session_kv = self.kv_manager.get(message.session)
        if session_kv is None:
            self._report_unknown(sender, message)
        elif session_kv.coordinator == sender and message.epoch >= session_kv.epoch:
            session_kv.expires = self.expiry(message.lease_ms)
            session_kv.orphaned = False

    def on_peer_gone(self, peer: PeerId) -> None:
        """Let other peers take over the sessions of a coordinator, after the link with it went down."""
        for session_kv in self.kv_manager:
            if session_kv.coordinator == peer:
                session_kv.orphaned = True

    def on_close(self, sender: PeerId, message: Close, payload: memoryview) -> None:
        """Free the session's caches of epochs up to the closed one, or with `undo` of that one only.

        The answer contains the number of freed pages.
        """
        session_kv = self.kv_manager.get(message.session)
        freed = 0
        if session_kv is not None and session_kv.coordinator == sender:
            freed = self._free(session_kv, message.epoch, message.reason, only_epoch=message.undo)
            self.story.note(message.session, "closed", epoch=message.epoch, reason=message.reason)
        try_send(self.links.send, sender, Closed(session=message.session, epoch=message.epoch, freed_blocks=freed))

    def sweep(self) -> None:
        """Free the sessions whose lease ran out."""
        now = self.clock.monotonic()
        for session_kv in self.kv_manager:
            if session_kv.expires < now:
                log.warning("session %s: the lease ran out without a renewal; its KV is freed", session_kv.session)
                self.story.note(session_kv.session, "lease ran out")
                self._free(session_kv, session_kv.epoch, "the lease ran out")

    def free_all(self, reason: str) -> None:
        """Free all sessions."""
        for session_kv in self.kv_manager:
            self._free(session_kv, session_kv.epoch, reason)

    def _free(self, session_kv: SessionKv, epoch: int, reason: str, *, only_epoch: bool = False) -> int:
        """End the session's stages of epochs up to `epoch`, and free its caches of these epochs, or of `epoch` only.

        Returns: the number of pages that are free now, or will be when the running step ends.
        """
        self.runner.end_before(session_kv.session, epoch + 1, reason)
        self.preparing.end_before(session_kv.session, epoch + 1, reason)
        freed = self.kv_manager.drop_where(session_kv, lambda cache: cache.epoch == epoch if only_epoch else cache.epoch <= epoch)
        self.on_change()
        return freed

    def _report_unknown(self, sender: PeerId, message: Renew) -> None:
        """Answer a RENEW for an unknown session: this peer has restarted, or the lease ran out before the renewal came.

        Nobody is blamed: the peer may take the stage again.
        """
        failed = Failed(
            session=message.session,
            epoch=message.epoch,
            step=0,
            stage=0,
            code=PeerLost.code,
            message="this peer has no KV of the session any more: it has restarted, or the lease ran out",
        )
        try_send(self.links.send, sender, failed)
