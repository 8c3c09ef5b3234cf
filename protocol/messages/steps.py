"""Messages of a session's steps, from the prompt to the tokens."""

from meshd.protocol.messages.base import SessionMessage, message
from meshd.types import TokenLogprobs


@message(50)
class Prompt(SessionMessage, frozen=True, kw_only=True):
    """Payload: token ids, `i32[tokens]`. One prefill chunk for the first stage."""

    step: int
    """Position of the chunk's first token, which is the step's number."""
    tokens: int
    last: bool
    """This chunk contains the last known token, and the last stage samples after it."""


@message(51)
class Activation(SessionMessage, frozen=True, kw_only=True):
    """Payload: hidden states `[tokens, hidden]`, row-major, little-endian, of `dtype`."""

    step: int
    stage: int
    """The receiving stage."""
    tokens: int
    hidden: int
    dtype: str
    sample: bool


@message(58)
class Taken(SessionMessage, frozen=True, kw_only=True):
    """A stage has begun this prefill step, so the previous stage may send one more. This bounds the steps in transit."""

    step: int
    stage: int


@message(52)
class Token(SessionMessage, frozen=True, kw_only=True):
    """A token that the last stage sampled. It is sent to the coordinator, and to the first stage as its next step."""

    step: int
    """The step after which the token was sampled."""
    index: int
    """Index in the answer, from 0."""
    token: int
    logprobs: TokenLogprobs | None = None
    final: bool = False
    finish: str = ""
    """`stop` (end of sequence) or `length`, if final."""
