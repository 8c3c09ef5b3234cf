"""One answer's record of faults: copies of its KV, peers that it distrusts, and past changes of its plan."""

from dataclasses import dataclass, field
from typing import Literal

from meshd.types import LayerRange, PeerId

_DISTRUST_S = 30.0
NEAR_TIE = "a near-tie between two tokens may be decided otherwise than before"
"""What a change of numerics means for an answer."""
Cause = Literal["loss", "move", "resume"]
"""Why an answer's plan changes: something failed, it runs better or must run elsewhere, or a suspended answer runs again."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """One change of plan in a running answer."""

    epoch: int
    method: str
    """`kept`, `mirror`, `replay` or `prefill`: the most expensive method that any stage needed."""
    cause: Cause
    reason: str
    pause_s: float
    """Seconds from the last token before the change to the first one after it."""
    other_numerics: str = ""
    """Layers, such as `4-8`, that are computed with other numerics since the change: a near-tie may be decided otherwise."""


@dataclass(slots=True)
class RecoveryHistory:
    """Mirrors, distrusted peers and changes of plan of one answer."""

    mirrors: dict[int, tuple[PeerId, int]] = field(default_factory=dict)
    """Stage of the present plan -> the peer with a copy of its KV, and the number of positions in the copy."""
    recoveries: list[Recovered] = field(default_factory=list)
    cause: Cause = "loss"
    reason: str = ""
    """Why the plan is changing now, or why it last changed."""
    other_numerics: tuple[LayerRange, ...] = ()
    """Layers that the plan which is opened now computes with other numerics than the plan before."""
    _distrusted: dict[PeerId, float] = field(default_factory=dict)
    """Peer at fault in this session -> time until which the session's plans avoid it."""
    _pending: tuple[int, str, Cause, str, str] | None = None
    """A change of plan after which no token has arrived yet: `Recovered` without the pause."""

    def begins(self, cause: Cause, reason: str) -> None:
        """Record why the plan changes from now on."""
        self.cause, self.reason = cause, reason

    def distrust(self, peer: PeerId | None, now: float) -> None:
        """Avoid this peer in the session's plans for `_DISTRUST_S`. None: the peer at fault is not known, and nothing changes."""
        if peer is not None:
            self._distrusted[peer] = now + _DISTRUST_S

    def distrusted(self, now: float) -> set[PeerId]:
        return {peer for peer, until in self._distrusted.items() if until > now}

    def forget_copies(self, peer: PeerId) -> None:
        """Remove the copies at this peer, which is lost."""
        self.mirrors = {stage: copy for stage, copy in self.mirrors.items() if copy[0] != peer}

    def changed(self, epoch: int, method: str) -> None:
        """Record that the stages of a new plan resume. The next token ends the pause."""
        self.mirrors.clear()  # all mirrors are copies of the old plan's stages
        self._pending = (epoch, method, self.cause, self.reason, ",".join(map(str, self.other_numerics)))

    def first_token(self, pause_s: float) -> Recovered | None:
        """Complete the pending change of plan, if any, because a token arrived `pause_s` seconds after the token before it.

        Returns: the change of plan; None if the plan had not changed.
        """
        if self._pending is None:
            return None
        epoch, method, cause, reason, other_numerics = self._pending
        self._pending = None
        recovered = Recovered(epoch, method, cause, reason, pause_s, other_numerics)
        self.recoveries.append(recovered)
        return recovered
