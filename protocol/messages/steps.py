"""Messages of a session's steps, from the prompt to the tokens (SPEC.md, section 8)."""

from enum import StrEnum
from typing import Annotated

import msgspec

from meshd import bounds
from meshd.bounds import (
    MAX_BATCH,
    MAX_VERIFIED,
    Count,
    Epoch,
    Size,
    StageCount,
    StageIndex,
    StepTokens,
    TokenId,
    at_most,
    from_one_to,
)
from meshd.protocol.messages.base import Lane, Message, SessionMessage, message
from meshd.types import SessionId, TokenLogprobs

STEP_WINDOW = 4
"""Steps that OPEN allows the sender of an edge to send before the first ACK. The receiver has room for this many of the longest
steps, so it bounds the memory of a session at a stage: 4 chunks of 128 tokens of a 4,096 wide model are 8 MiB."""


class TokensFinish(StrEnum):
    """Why an answer ends with a token."""

    STOP = "stop"
    """The token ends the sequence."""
    LENGTH = "length"


class StepKind(StrEnum):
    """What a step is for. It decides the lane, never the size, so that steps of one kind do not overtake one another."""

    PREFILL = "prefill"
    """A chunk of tokens that were known when the epoch began."""
    DECODE = "decode"
    """One token, which the last stage has sampled."""
    VERIFY = "verify"
    """A token and guesses of those after it. The last stage samples after each, and stops where a guess was wrong."""
    REFILL = "refill"
    """Known positions whose KV is missing at the receiver. It computes them, and sends nothing on."""

    @property
    def lane(self) -> Lane:
        """Prefill and refill steps are large. A decode step begins after every stage has computed the last prefill step."""
        return Lane.BULK if self in (StepKind.PREFILL, StepKind.REFILL) else Lane.CONTROL


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One unit of work of a session at a stage. (session, epoch, stage, seq) names it."""

    session: SessionId
    epoch: Epoch
    stage: StageIndex
    """The receiving stage."""
    seq: Count
    """0, 1, 2, ...: counted by the sender of this edge, for each session and epoch."""
    start: bounds.Tokens
    """Position of the first token. If the stage has computed positions from here on, their KV is replaced."""
    tokens: StepTokens
    kind: StepKind
    sample: bounds.Tokens = 0
    """After how many of its last rows the last stage samples."""
    committed: bounds.Tokens
    """No later step of this epoch begins before this position."""
    size: Size
    """Bytes of the frame's payload that belong to this step, after those of the steps before it."""
    ids: Annotated[tuple[TokenId, ...], at_most(MAX_VERIFIED)] = ()
    """VERIFY only: the ids of the step's tokens, which the last stage compares with those that it samples."""


@message(72)
class Steps(Message, frozen=True, kw_only=True):
    """Steps of one or several sessions, of kinds that share a lane.

    Payload: for each step, token ids `i32[tokens]` for a first stage, otherwise hidden states `[tokens, hidden]` in the plan's wire
    dtype, row-major, little-endian.
    """

    steps: Annotated[tuple[Step, ...], from_one_to(MAX_BATCH)]

    @property
    def send_lane(self) -> Lane:
        return self.steps[0].kind.lane


@message(73)
class Ack(SessionMessage, frozen=True, kw_only=True):
    """The receiver of an edge has begun or dropped steps, so that its sender may send more.

    From a stage to the one before it. From the coordinator to the first and the last stage, where it counts answer tokens instead
    of steps: how many may be made.
    """

    stage: StageCount
    """The stage that sends this; for the coordinator, the number of stages."""
    next_seq: bounds.Tokens
    """All steps before this number have arrived; from the coordinator, all answer tokens."""
    credit: bounds.Tokens
    """Steps before this number may be sent. Between stages credit is never taken back. A coordinator may allow less than before: so
    it stops an answer before it changes the plan."""


@message(74)
class Tokens(SessionMessage, frozen=True, kw_only=True):
    """Tokens that the last stage sampled after one step: to the coordinator, and to the first stage, which makes its next step of
    the last one."""

    index: bounds.Tokens
    """Index in the answer of the first one, from 0. It names the message: what is known already is dropped."""
    tokens: Annotated[tuple[TokenId, ...], from_one_to(MAX_VERIFIED)]
    logprobs: Annotated[tuple[TokenLogprobs, ...], at_most(MAX_VERIFIED)] = ()
    """One for each token, if the request asked for them."""
    finish: TokensFinish | None = None
    """Why the answer ends with the last of these tokens. None: the answer continues."""
