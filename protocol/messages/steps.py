"""Messages of a session's steps, from the prompt to the tokens."""

from typing import ClassVar

from meshd.bounds import StageIndex, TokenId, Tokens, Width, Word
from meshd.protocol.messages.base import Lane, SessionMessage, message
from meshd.types import TokenLogprobs


@message(50)
class Prompt(SessionMessage, frozen=True, kw_only=True):
    """Payload: token ids, `i32[tokens]`. One prefill chunk for the first stage."""

    default_lane: ClassVar[Lane] = Lane.BULK
    step: Tokens
    """Position of the chunk's first token, which is the step's number."""
    tokens: Tokens
    last: bool
    """This chunk contains the last known token, and the last stage samples after it."""


@message(51)
class Activation(SessionMessage, frozen=True, kw_only=True):
    """Payload: hidden states `[tokens, hidden]`, row-major, little-endian, of `dtype`."""

    step: Tokens
    stage: StageIndex
    """The receiving stage."""
    tokens: Tokens
    hidden: Width
    dtype: Word
    sample: bool
    prefill: bool = False
    """The step's tokens were known when the epoch began. All prefill steps take the bulk lane, so that a short one never overtakes
    a long one. A decode step takes the control lane: it begins after every stage has computed the last prefill step."""

    @property
    def send_lane(self) -> Lane:
        return Lane.BULK if self.prefill else Lane.CONTROL


@message(58)
class Taken(SessionMessage, frozen=True, kw_only=True):
    """A stage has begun this prefill step, so the previous stage may send one more. This bounds the steps in transit."""

    step: Tokens
    stage: StageIndex


@message(52)
class Token(SessionMessage, frozen=True, kw_only=True):
    """A token that the last stage sampled. It is sent to the coordinator, and to the first stage as its next step."""

    step: Tokens
    """The step after which the token was sampled."""
    index: Tokens
    """Index in the answer, from 0."""
    token: TokenId
    logprobs: TokenLogprobs | None = None
    final: bool = False
    finish: Word = ""
    """`stop` (end of sequence) or `length`, if final."""
