"""Answer tokens that wait to be sent to a deputy."""

from dataclasses import dataclass, field
from itertools import islice

from meshd.agents.session.journal.record import AnswerToken

_MESSAGE_TOKENS = 128
"""Maximum number of tokens in one message: with 20 logprobs each, they still fit into the message's header."""


@dataclass(slots=True)
class PendingTokens:
    """The tokens of one answer that its deputy does not have yet. Pure."""

    sent: int = 0
    """Number of tokens that were sent to the deputy."""
    pending: list[AnswerToken] = field(default_factory=list)

    def add(self, index: int, token: AnswerToken) -> bool:
        """Add the token with this index. Adding a token a second time changes nothing.

        Returns: False if a token before it is missing; the token is then not added.
        """
        expected = self.sent + len(self.pending)
        if index == expected:
            self.pending.append(token)
        return index <= expected

    def take(self) -> tuple[int, tuple[AnswerToken, ...]]:
        """Remove the tokens for the next message, and count them as sent. Returns: (index of the first one, tokens)."""
        index, tokens = self.sent, tuple(islice(self.pending, _MESSAGE_TOKENS))
        del self.pending[: len(tokens)]
        self.sent += len(tokens)
        return index, tokens
