"""What the state machine of a stage's session takes in (`Event`) and asks for (`Command`)."""

from dataclasses import dataclass

from meshd.protocol.messages import Lane, StepKind


@dataclass(frozen=True, slots=True)
class StageStep:
    """A step at one stage: tokens `[start, start + tokens)`. The first stage computes its prompt in slices, which are steps too."""

    start: int
    tokens: int
    kind: StepKind
    sample: int = 0
    """After how many of the last rows the last stage samples."""
    committed: int = 0
    """No later step of the epoch begins before this position."""
    seq: int = 0
    """Number on the edge into this stage. A step that the first stage makes itself has none."""
    ids: tuple[int, ...] = ()
    """The step's token ids, if this stage knows them from a header or made the step itself."""
    data: object = None
    """Token ids or hidden states, as they were received. A slice has those of the whole step."""

    @property
    def end(self) -> int:
        return self.start + self.tokens

    @property
    def prefill(self) -> bool:
        """Whether the step's tokens were known when the epoch began."""
        return self.kind.lane is Lane.BULK

    @property
    def sampled_from(self) -> int:
        """Position of the first token that is sampled after this step."""
        return self.end - self.sample + 1


@dataclass(frozen=True, slots=True)
class SentStep:
    """A step on the edge to the next stage."""

    seq: int
    step: StageStep
    output: object
    """The rows for the next stage. None: those that are kept of an earlier epoch."""
    skip: int = 0
    """Leading rows that are not sent, because the next stage has them."""


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """Tokens that the last stage sampled after one step."""

    index: int
    """Index of the first one in the answer."""
    tokens: tuple[int, ...]
    output: object


@dataclass(frozen=True, slots=True)
class StageResumed:
    """All stages of the epoch are open. Compute from `start` on; the next stage needs the outputs from `send_from` on."""

    start: int
    send_from: int


@dataclass(frozen=True, slots=True)
class StepArrived:
    """A step arrived from the previous stage, or at the first stage from the coordinator."""

    step: StageStep


@dataclass(frozen=True, slots=True)
class TokensArrived:
    """At the first stage: the last stage has sampled tokens. `drafts` are guesses of the tokens after them."""

    index: int
    tokens: tuple[int, ...]
    drafts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokensGuessed:
    """At the first stage: guesses of the tokens after those of the newest step, which has not been answered yet."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepBegun:
    """The scheduler has chosen the first `tokens` tokens of the ready step."""

    tokens: int


@dataclass(frozen=True, slots=True)
class StepComputed:
    output: object
    tokens: tuple[int, ...] = ()
    """What the last stage sampled."""
    ends: bool = False
    """Whether the answer ends with the last of these tokens."""


@dataclass(frozen=True, slots=True)
class OutputAcknowledged:
    """The next stage has begun steps before `next_seq` and takes those before `credit`."""

    next_seq: int
    credit: int


@dataclass(frozen=True, slots=True)
class TokensGranted:
    """At the first and the last stage: the coordinator takes the answer's tokens before index `credit`."""

    credit: int


@dataclass(frozen=True, slots=True)
class StageEnded:
    """The coordinator closed the stage or opened a later epoch, the stage failed, or its lease ran out."""

    reason: str


Event = (
    StageResumed
    | StepArrived
    | TokensArrived
    | TokensGuessed
    | TokensGranted
    | StepBegun
    | StepComputed
    | OutputAcknowledged
    | StageEnded
)


@dataclass(frozen=True, slots=True)
class BeginAt:
    """Drop KV and kept outputs from position `start` on: they are computed again."""

    start: int


@dataclass(frozen=True, slots=True)
class Truncate:
    """Drop kept outputs from position `start` on: they were computed from wrong guesses."""

    start: int


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """Report to the sender of this stage's steps which ones have arrived, and how many it may send."""

    next_seq: int
    credit: int


@dataclass(frozen=True, slots=True)
class Deliver:
    """Send a step to the next stage."""

    sent: SentStep


@dataclass(frozen=True, slots=True)
class DeliverTokens:
    """Send sampled tokens to the first stage and the coordinator."""

    sampled: SampledTokens


@dataclass(frozen=True, slots=True)
class RejectStep:
    """Report to the coordinator that the stage can't take this step."""

    step: StageStep
    reason: str


@dataclass(frozen=True, slots=True)
class RefuseResume:
    """Report to the coordinator that the stage can't start as RESUME requests."""

    reason: str


@dataclass(frozen=True, slots=True)
class FreeKv:
    """Release the stage's KV: no step computes on it any more."""

    reason: str


Command = BeginAt | Truncate | Acknowledge | Deliver | DeliverTokens | RejectStep | RefuseResume | FreeKv
