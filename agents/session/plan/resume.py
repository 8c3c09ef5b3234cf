"""How a session continues under another plan: where each stage starts to compute, given what each stage still has.

House rules of this file: no I/O, no clock. A change of plan has one procedure, whatever its cause (a loss, a move, a takeover):
each stage of the new plan reports what it still has of the session, and the reports decide which positions are computed again and
which kept outputs are only sent again.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from meshd.numerics import UNKNOWN
from meshd.types import LayerRange, PeerId, Plan, StagePlan, ranges_of

KEPT = "kept"
"""Every stage has all its KV: nothing is computed again."""
MIRROR = "mirror"
"""A copy of the KV on another peer is used. At most the positions that were not copied yet are computed again."""
REPLAY = "replay"
"""Some layers are computed again, from the outputs that the previous stage kept (the first stage: from the tokens)."""
PREFILL = "prefill"
"""All layers are computed again, from the first token on."""


@dataclass(frozen=True, slots=True)
class StageHeld:
    """What one stage of a new plan still has of the session. Its peer reports this in OPENED."""

    held: int
    """The stage has the KV of positions `[0, held)`."""
    mirrored: bool = False
    """Whether the KV of `[0, held)` is a copy from another peer."""
    kept_from: int = 0
    """The stage has kept its outputs of positions `[kept_from, kept_to)` and can send them again."""
    kept_to: int = 0
    held_from: int = 0
    """The stage can start at a position from `held_from` to `held`, or at 0."""


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where one stage of a new plan starts to compute, and to send. RESUME carries it."""

    start: int
    """The first position that the stage computes."""
    send_from: int
    """The first position whose output the next stage needs. If it is before `start`, the stage sends the outputs of
    `[send_from, start)` that it kept from an earlier epoch."""


def resume_points(held: Sequence[StageHeld], known: int) -> tuple[ResumePoint, ...]:
    """Choose where each stage starts, so that as few positions as possible are computed again.

    When the last stage samples, every stage must have the KV of positions `[0, known)`. The last known token is always computed.

    held: what each stage has.
    known: number of tokens that the coordinator has, at least 1.
    Returns: one point for each stage.
    """
    if known < 1 or not held:
        raise ValueError(f"cannot resume {len(held)} stages from {known} known tokens")
    # From the last stage to the first: a stage needs input for every position that it computes, so the previous stage must have
    # kept those outputs, or compute them as well.
    send_from = known - 1  # the sampler, which follows the last stage, needs only the last position
    points: list[ResumePoint] = []
    for stage in reversed(held):
        start = max(0, min(stage.held, known - 1))
        if start > send_from:
            kept_to = max(stage.kept_to, send_from) if stage.kept_from <= send_from else send_from
            start = min(start, kept_to)
        if start < stage.held_from:
            start = 0  # what it needs of earlier positions has left the windows of its layers
        points.append(ResumePoint(start, send_from))
        send_from = start
    return tuple(reversed(points))


def method_of(held: Sequence[StageHeld], points: Sequence[ResumePoint], known: int) -> str:
    """Returns: the most expensive method that a stage needs: `kept`, `mirror`, `replay` or `prefill`."""
    if not any(stage.held for stage in held):
        return PREFILL
    first = min(point.start for point in points)
    copied = [min(stage.held, known - 1) for stage in held if stage.mirrored]
    if first == known - 1:
        return MIRROR if copied else KEPT
    if max(point.start for point in points) == 0:
        return PREFILL
    return MIRROR if copied and 0 < min(copied) <= first else REPLAY


def changed_numerics(old: Plan | None, new: Plan) -> tuple[LayerRange, ...]:
    """Returns: the layers that the new plan computes with other numerics than the old one; none if there was no old plan."""
    if old is None:
        return ()
    before = {layer: old.numerics_of(number) for number, stage in enumerate(old.stages) for layer in stage.layers}
    after = {layer: new.numerics_of(number) for number, stage in enumerate(new.stages) for layer in stage.layers}
    return ranges_of(
        [layer for layer, numerics in after.items() if numerics and before.get(layer) not in (UNKNOWN, None, numerics)]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryRequest:
    """What a plan must offer so that the session can continue under it."""

    old: Plan | None
    """The last plan that ran, whether it broke or still runs. None: there was none."""
    lost: frozenset[PeerId]
    """Peers that lost their KV of the session. A lost peer that has come back may get a stage like any other peer."""
    avoid: frozenset[PeerId]
    """Peers that get a stage only if there is no other plan. Their KV of the session is not used."""
    prompt_tokens: int
    max_tokens: int
    known: int
    """Number of tokens that the coordinator has: the prompt and the answer so far."""
    mirrors: Mapping[int, tuple[PeerId, int]] = field(default_factory=dict)
    """Stage of `old` -> the peer with a copy of its KV, and the number of positions in the copy."""

    @property
    def context(self) -> int:
        """Number of tokens to reserve KV for."""
        return self.prompt_tokens + self.max_tokens

    @property
    def copies(self) -> dict[int, tuple[PeerId, int]]:
        """The mirrors on peers that are neither lost nor to be avoided."""
        gone = self.lost | self.avoid
        return {stage: copy for stage, copy in self.mirrors.items() if copy[0] not in gone}


@dataclass(frozen=True, slots=True)
class RecoveryPlan:
    """A plan under which a session can continue."""

    plan: Plan
    method: str
    """The predicted method: `kept`, `mirror`, `replay` or `prefill`."""
    predicted_s: float
    """Predicted pause until the next token."""


def expected_held(request: RecoveryRequest, stages: Sequence[StagePlan], surviving: Collection[int]) -> tuple[StageHeld, ...]:
    """Predict what the stages of a new plan will report in OPENED.

    `surviving`: the stages of the old plan whose KV is still there.
    """
    return tuple(_expected(request, stage, surviving) for stage in stages)


def _expected(request: RecoveryRequest, stage: StagePlan, surviving: Collection[int]) -> StageHeld:
    if request.old is None:
        return StageHeld(0)
    best, before = StageHeld(0), request.old.stages
    for number, (peer, held) in request.copies.items():
        if peer == stage.peer and number < len(before) and stage.layers in before[number].layers and held > best.held:
            best = StageHeld(held, mirrored=True)
    for number in surviving:
        if before[number].peer == stage.peer and stage.layers in before[number].layers:
            same_end = stage.layers.end == before[number].layers.end
            best = StageHeld(request.known - 1, kept_to=request.known - 1 if same_end else 0)
    return best
