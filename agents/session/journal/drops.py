"""Deputies that keep a record in vain, and are sent JOURNAL_DROP for it."""

from logging import getLogger

from meshd.agents.links.links import Links
from meshd.clock import Clock
from meshd.errors import MeshdError
from meshd.protocol.messages import JournalDrop
from meshd.types import PeerId, SessionId

log = getLogger(__name__)

KEEP_ENDED_S = 600.0
_MAX_DROPS = 1024


class DropQueue:
    """JOURNAL_DROP messages that wait for their time, or for a link to the peer."""

    def __init__(self, links: Links, clock: Clock) -> None:
        self._links = links
        self._clock = clock
        self._due: dict[tuple[PeerId, SessionId], tuple[float, int]] = {}
        """(not before, epoch)"""

    def add(self, peer: PeerId, session: SessionId, epoch: int, after_s: float = 0.0) -> None:
        """Have this peer drop the record after `after_s`, or as soon as it can be reached."""
        self._due.pop((peer, session), None)
        self._due[peer, session] = self._clock.monotonic() + after_s, epoch
        while len(self._due) > _MAX_DROPS:
            del self._due[next(iter(self._due))]
        if not after_s:
            self._send(peer, session, epoch)

    def revoke(self, peer: PeerId, session: SessionId) -> None:
        """It is to keep the record after all."""
        self._due.pop((peer, session), None)

    def send_due(self, now: float) -> None:
        """Send what is due. Called periodically."""
        for (peer, session), (due, epoch) in list(self._due.items()):
            if now - due > KEEP_ENDED_S:
                del self._due[peer, session]  # its own expiry has removed the record by now
            elif due <= now:
                self._send(peer, session, epoch)

    def _send(self, peer: PeerId, session: SessionId, epoch: int) -> None:
        try:
            self._links.send(peer, JournalDrop(session=session, epoch=epoch))
        except MeshdError as error:
            log.debug("session %s: %.8s still keeps its record: %s", session, peer, error)
        else:
            self._due.pop((peer, session), None)
