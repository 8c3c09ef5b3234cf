"""How a session continues under another plan: what each stage still has, where each starts, and what that method is called.

House rules of this file: no I/O, no clock. Every change of plan (after a loss, a move, growth, a take-over) is the same thing here:
the stages of the new plan report what they still have of the session, which decides what is computed again and what is only sent.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from meshd.types import PeerId, Plan, StagePlan

KEPT = "kept"
"""Every stage has all its KV: nothing is computed again."""
MIRROR = "mirror"
"""KV that was copied to another peer is used; at most what the copy lacked at its end is computed again."""
REPLAY = "replay"
"""Some layers are computed again, from inputs that the stage before them kept (the first stage: from the tokens)."""
PREFILL = "prefill"
"""All layers are computed again from the first token on."""


@dataclass(frozen=True, slots=True)
class StageHeld:
    """What one stage of a new plan has of the session, as its OPENED tells."""

    held: int
    """Its KV of positions `[0, held)` is there."""
    mirrored: bool = False
    """It came as a copy from another peer."""
    kept_from: int = 0
    """Its outputs of positions `[kept_from, kept_to)` are kept, and can be sent again."""
    kept_to: int = 0


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where one stage goes on."""

    start: int
    """The first position that it computes."""
    send_from: int
    """The first position whose output the next stage wants: those before `start` come from what was kept."""


def resume_positions(held: Sequence[StageHeld], known: int) -> tuple[ResumePoint, ...]:
    """Where each stage starts, so that all have positions `[0, known)` when the last one samples, and as little as possible is
    computed again.

    `known` (at least 1) counts the tokens that the coordinator knows; the last of them is always computed. From the last stage to
    the first: what a stage computes it needs as input, so the stage before it must have that output kept, or compute it as well.
    """
    if known < 1 or not held:
        raise ValueError(f"{len(held)} stages and {known} known tokens: there is nothing to go on with")
    wanted = known - 1  # by the sampler, which comes after the last stage
    positions: list[ResumePoint] = []
    for place in range(len(held) - 1, -1, -1):
        have = held[place]
        start = max(0, min(have.held, known - 1))
        if start > wanted:
            kept_to = max(have.kept_to, wanted) if have.kept_from <= wanted else wanted
            start = min(start, kept_to)
        positions.append(ResumePoint(start, wanted))
        wanted = start
    return tuple(reversed(positions))


def method_of(held: Sequence[StageHeld], resumptions: Sequence[ResumePoint], known: int) -> str:
    """The most expensive thing that has to be done: `kept`, `mirror`, `replay` or `prefill`."""
    if not any(have.held for have in held):
        return PREFILL
    least = min(resumption.start for resumption in resumptions)
    copied = [min(have.held, known - 1) for have in held if have.mirrored]
    if least == known - 1:
        return MIRROR if copied else KEPT
    if max(resumption.start for resumption in resumptions) == 0:
        return PREFILL
    return MIRROR if copied and 0 < min(copied) <= least else REPLAY


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryRequest:
    """What a plan must offer so that the session can continue under it."""

    old: Plan | None
    """The plan that broke, or that runs; None: there is none yet."""
    lost: frozenset[PeerId]
    """What lay there of the session is gone. Such a peer may be here again, and then it counts like any other."""
    avoid: frozenset[PeerId]
    """Not to be used while there is another way; what lies there of the session is not counted on."""
    prompt_tokens: int
    max_tokens: int
    known: int
    """Tokens that the coordinator knows: the prompt and the answer so far."""
    mirrors: Mapping[int, tuple[PeerId, int]] = field(default_factory=dict)
    """Stage of `old` -> where a copy of its KV lies, and how many positions of it."""

    @property
    def context(self) -> int:
        """Tokens to reserve KV for."""
        return self.prompt_tokens + self.max_tokens

    @property
    def copies(self) -> dict[int, tuple[PeerId, int]]:
        """The mirrors that can be counted on."""
        gone = self.lost | self.avoid
        return {stage: copy for stage, copy in self.mirrors.items() if copy[0] not in gone}


@dataclass(frozen=True, slots=True)
class RecoveryPlan:
    """A plan to go on with."""

    plan: Plan
    method: str
    """As predicted: `kept`, `mirror`, `replay` or `prefill`."""
    predicted_s: float
    """To the next token."""


def expected_held(request: RecoveryRequest, stages: Sequence[StagePlan], surviving: Collection[int]) -> tuple[StageHeld, ...]:
    """What the stages of a new plan will tell, as far as can be known before they are asked.

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
