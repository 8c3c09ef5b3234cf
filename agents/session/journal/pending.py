"""Answer tokens that wait to be sent to a deputy."""

from dataclasses import dataclass, field

from meshd.agents.session.journal.record import AnswerToken, token_bytes

_MESSAGE_TOKENS = 128
"""Maximum number of tokens in one message: with 20 logprobs each, they still fit into the message's header."""


@dataclass(slots=True)
class PendingTokens:
    """The tokens of one answer that its deputy does not have yet. Pure."""

    sent: int = 0
    """Number of tokens that were sent to the deputy."""
    pending: list[AnswerToken] = field(default_factory=list)
    room_bytes: int = 1 << 60
    """Bytes of tokens that may still be sent to the deputy."""
    full: bool = False
    """Whether a token did not fit any more: no later one is sent."""

    def add(self, index: int, token: AnswerToken) -> bool:
        """Add the token with this index. Adding a token a second time changes nothing.

        Returns: False if a token before it is missing; the token is then not added.
        """
        if self.full:
            return True
        expected = self.sent + len(self.pending)
        if index == expected:
            self.pending.append(token)
        return index <= expected

    def take(self) -> tuple[int, tuple[AnswerToken, ...]]:
        """Remove the tokens for the next message, and count them as sent. Returns: (index of the first one, tokens)."""
        index, tokens = self.sent, tuple(self.pending[:_MESSAGE_TOKENS])
        sizes = list(map(token_bytes, tokens))
        while sum(sizes) > self.room_bytes:
            self.full = True
            sizes.pop()
        tokens = tokens[: len(sizes)]
        self.room_bytes -= sum(sizes)
        self.sent += len(tokens)
        if self.full:
            self.pending.clear()
        else:
            del self.pending[: len(tokens)]
        return index, tokens
