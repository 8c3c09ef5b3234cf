"""Queues JOURNAL_DROP messages, which make a deputy delete a record that is no longer needed."""

from logging import getLogger

from meshd.agents.links.links import Links
from meshd.clock import Clock
from meshd.errors import MeshdError
from meshd.protocol.messages import JournalDrop
from meshd.types import PeerId, SessionId

log = getLogger(__name__)

KEEP_ENDED_S = 600.0
"""How long the record of an ended answer is kept."""
_MAX_DROPS = 1024


class DropQueue:
    """Queue of JOURNAL_DROP messages that are not due yet, or whose peer cannot be reached."""

    def __init__(self, links: Links, clock: Clock) -> None:
        self._links = links
        self._clock = clock
        self._due: dict[tuple[PeerId, SessionId], tuple[float, int]] = {}
        """(peer, session) -> (monotonic time when the message is due, epoch of the record)"""

    def add(self, peer: PeerId, session: SessionId, epoch: int, after_s: float = 0.0) -> None:
        """Make this peer delete the record after `after_s` seconds, or later, as soon as the peer can be reached."""
        self._due.pop((peer, session), None)
        self._due[peer, session] = self._clock.monotonic() + after_s, epoch
        while len(self._due) > _MAX_DROPS:
            del self._due[next(iter(self._due))]
        if not after_s:
            self._send(peer, session, epoch)

    def revoke(self, peer: PeerId, session: SessionId) -> None:
        """Cancel the message: the peer must keep the record."""
        self._due.pop((peer, session), None)

    def send_due(self, now: float) -> None:
        """Send the messages that are due. Called periodically."""
        for (peer, session), (due, epoch) in list(self._due.items()):
            if now - due > KEEP_ENDED_S:
                del self._due[peer, session]  # the record has expired at the deputy by now
            elif due <= now:
                self._send(peer, session, epoch)

    def _send(self, peer: PeerId, session: SessionId, epoch: int) -> None:
        try:
            self._links.send(peer, JournalDrop(session=session, epoch=epoch))
        except MeshdError as error:
            log.debug("session %s: %.8s still has the record: %s", session, peer, error)
        else:
            self._due.pop((peer, session), None)
