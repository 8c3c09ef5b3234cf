"""The tokens that wait for a message to the deputy."""

from in_process.journals import S, answer
from meshd.agents.session.journal.pending import PendingTokens
from meshd.protocol.codec import encode
from meshd.protocol.framing import MAX_HEADER
from meshd.protocol.messages import JournalTokens
from meshd.types import TokenLogprobs


def test_a_batch_takes_each_token_once_and_in_order() -> None:
    batch = PendingTokens(sent=2)
    assert all(batch.add(index, (100 + index, None)) for index in (0, 1, 2, 2, 3, 1))
    assert not batch.add(5, (105, None))
    assert batch.take() == (2, answer(4, 2))
    assert batch.take() == (4, ())
    assert batch.add(3, (0, None))
    assert batch.add(4, (104, None))
    assert batch.take() == (4, answer(5, 4))


def test_a_batch_goes_out_in_messages_that_fit() -> None:
    top = tuple((200_000 + rank, -1.23456789 * rank) for rank in range(20))
    batch = PendingTokens()
    for index in range(300):
        assert batch.add(index, (200_000, TokenLogprobs(-1.5, top)))
    sizes = []
    while batch.pending:
        _, tokens = batch.take()
        sizes.append(len(tokens))
        message = JournalTokens(session=S, epoch=1, index=0, tokens=tokens)
        assert len(encode(message)) <= MAX_HEADER
    assert sum(sizes) == 300


def test_a_token_after_a_gap_is_refused_and_changes_nothing() -> None:
    batch = PendingTokens(sent=3)
    assert not batch.add(4, (104, None))
    assert batch.pending == []
    assert batch.take() == (3, ())
