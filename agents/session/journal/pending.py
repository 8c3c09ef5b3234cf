"""The tokens of an answer that its deputy does not have yet."""

from dataclasses import dataclass, field
from itertools import islice

from meshd.agents.session.journal.record import AnswerToken

_MESSAGE_TOKENS = 128
"""In one message: with 20 logprobs each they still fit its header."""


@dataclass(slots=True)
class PendingTokens:
    """The answer's tokens that the deputy does not have yet. Pure."""

    sent: int = 0
    """Tokens that it has, or that are on their way to it."""
    pending: list[AnswerToken] = field(default_factory=list)

    def add(self, index: int, token: AnswerToken) -> bool:
        """Take the token with this index; a repeat changes nothing. False: one is missing in between."""
        due = self.sent + len(self.pending)
        if index == due:
            self.pending.append(token)
        return index <= due

    def take(self) -> tuple[int, tuple[AnswerToken, ...]]:
        """The next tokens for one message, with the index of the first; they count as sent."""
        index, tokens = self.sent, tuple(islice(self.pending, _MESSAGE_TOKENS))
        del self.pending[: len(tokens)]
        self.sent += len(tokens)
        return index, tokens
