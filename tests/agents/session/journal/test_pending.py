"""Tokens that wait to be sent to a deputy."""

from in_process.journals import S, answer
from meshd.agents.session.journal.pending import PendingTokens
from meshd.agents.session.journal.record import token_bytes
from meshd.protocol.codec import encode
from meshd.protocol.framing import MAX_HEADER
from meshd.protocol.messages import JournalTokens
from meshd.types import TokenLogprobs


def test_each_token_is_taken_once_and_in_order() -> None:
    pending = PendingTokens(sent=2)
    assert all(pending.add(index, (100 + index, None)) for index in (0, 1, 2, 2, 3, 1))
    assert not pending.add(5, (105, None))
    assert pending.take() == (2, answer(4, 2))
    assert pending.take() == (4, ())
    assert pending.add(3, (0, None))
    assert pending.add(4, (104, None))
    assert pending.take() == (4, answer(5, 4))


def test_many_tokens_are_split_into_messages_that_fit() -> None:
    top = tuple((200_000 + rank, -1.23456789 * rank) for rank in range(20))
    pending = PendingTokens()
    for index in range(300):
        assert pending.add(index, (200_000, TokenLogprobs(-1.5, top)))
    sizes = []
    while pending.pending:
        _, tokens = pending.take()
        sizes.append(len(tokens))
        message = JournalTokens(session=S, epoch=1, index=0, tokens=tokens)
        assert len(encode(message)) <= MAX_HEADER
    assert sum(sizes) == 300


def test_a_token_after_a_gap_is_refused_and_changes_nothing() -> None:
    pending = PendingTokens(sent=3)
    assert not pending.add(4, (104, None))
    assert pending.pending == []
    assert pending.take() == (3, ())


def test_tokens_that_a_deputy_has_no_room_for_are_not_sent() -> None:
    """The deputy keeps the first part of a very long answer; after a loss the rest is computed again."""
    size = token_bytes((100, None))
    pending = PendingTokens(room_bytes=5 * size)
    assert all(pending.add(index, (100 + index, None)) for index in range(9))
    assert pending.take() == (0, answer(5))
    assert pending.full
    assert pending.add(9, (109, None))
    assert pending.add(20, (120, None)), "a token that is not sent leaves no gap"
    assert pending.take() == (5, ())
