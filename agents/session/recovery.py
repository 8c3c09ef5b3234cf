"""What one answer knows of faults: where copies of its KV are, which peers it distrusts, which changes of plan it survived."""

from dataclasses import dataclass, field

from meshd.types import PeerId

_DISTRUST_S = 30.0


@dataclass(frozen=True, slots=True)
class Recovered:
    """One change of plan in a running answer."""

    epoch: int
    method: str
    """`kept`, `mirror`, `replay` or `prefill`: the most expensive one that was needed."""
    reason: str
    pause_s: float
    """From the last token before the change to the first one after it."""


@dataclass(slots=True)
class RecoveryHistory:
    """Mirrors, distrusted peers and changes of plan of one answer."""

    mirrors: dict[int, tuple[PeerId, int]] = field(default_factory=dict)
    """Stage of the present plan -> the peer with a copy of its KV, and the number of positions in the copy."""
    recoveries: list[Recovered] = field(default_factory=list)
    reason: str = ""
    """Why the plan changes next, or changed last."""
    _distrusted: dict[PeerId, float] = field(default_factory=dict)
    """Peers at fault in this session, and until when they get no stage of it."""
    _pending: tuple[int, str, str] | None = None
    """(epoch, method, reason) of a change of plan that no token has followed yet."""

    def distrust(self, peer: PeerId | None, now: float) -> None:
        """Give this peer no stage of the session for a while. None: nobody is known to be at fault."""
        if peer is not None:
            self._distrusted[peer] = now + _DISTRUST_S

    def distrusted(self, now: float) -> set[PeerId]:
        return {peer for peer, until in self._distrusted.items() if until > now}

    def forget_copies(self, peer: PeerId) -> None:
        """The peer is lost, and its copies with it."""
        self.mirrors = {stage: copy for stage, copy in self.mirrors.items() if copy[0] != peer}

    def changed(self, epoch: int, method: str) -> None:
        """The stages of a new plan resume: earlier mirrors are of the old plan's stages, and the next token ends the pause."""
        self.mirrors.clear()
        self._pending = (epoch, method, self.reason)

    def first_token(self, pause_s: float) -> Recovered | None:
        """Record that a token came `pause_s` after the one before it.

        Returns: the change of plan that this token completes, if there was one.
        """
        if self._pending is None:
            return None
        epoch, method, reason = self._pending
        self._pending = None
        recovered = Recovered(epoch, method, reason, pause_s)
        self.recoveries.append(recovered)
        return recovered
