"""One answer: what its readers see, what its stages are sent, and what its record contains."""

import asyncio

import pytest

from in_process.answers import AnswerSite
from in_process.peers import Peers, until
from meshd.agents.service import Finished, TextDelta
from meshd.errors import Cancelled, DoesNotFit
from meshd.protocol.messages import Close, Prompt
from meshd.types import FinishReason
from sim.toy.text import letter


@pytest.fixture
async def site(peers: Peers) -> AnswerSite:
    return AnswerSite(peers.start("a"))


async def read(site: AnswerSite) -> tuple[str, Finished | None]:
    text, finished = "", None
    async for event in site.answer.events():
        if isinstance(event, TextDelta):
            text += event.text
        else:
            finished = event
    return text, finished


async def test_every_reader_sees_the_same_text_even_after_the_end(site: AnswerSite) -> None:
    await site.open(10)
    await until(lambda: bool(site.got(Prompt)))
    early = asyncio.create_task(read(site))
    await asyncio.sleep(0)
    site.answer.token_arrived(site.token(0, 7))
    site.answer.token_arrived(site.token(1, 8, "length"))
    text, finished = await early
    assert text == letter(7) + letter(8)
    assert finished is not None
    assert finished.reason is FinishReason.LENGTH
    assert await read(site) == (text, finished)
    assert site.events == ["opened", "token 0", "token 1", "end completed"]


async def test_a_stop_string_ends_the_answer_and_closes_its_stages(peers: Peers) -> None:
    site = AnswerSite(peers.start("a"), stop=(letter(8),))
    await site.open()
    site.answer.token_arrived(site.token(0, 7))
    site.answer.token_arrived(site.token(1, 8))
    assert site.answer.status == "completed"
    assert (await read(site))[0] == letter(7)
    await until(lambda: bool(site.got(Close)))


async def test_an_answer_without_a_plan_fails_for_its_request_and_its_readers(site: AnswerSite) -> None:
    site.answer.plan_failed(DoesNotFit("too large"))
    with pytest.raises(DoesNotFit, match="too large"):
        await site.answer.opened
    with pytest.raises(DoesNotFit, match="too large"):
        await read(site)
    assert site.events == ["end failed"]


async def test_a_cancelled_answer_raises_for_its_reader(site: AnswerSite) -> None:
    await site.open()
    reader = asyncio.create_task(read(site))
    await asyncio.sleep(0)
    site.answer.end()
    with pytest.raises(Cancelled):
        await reader
    assert site.answer.snapshot().finish == "cancelled"


@pytest.mark.parametrize("background", [False, True])
async def test_only_a_background_answer_continues_without_a_reader(peers: Peers, background: bool) -> None:
    site = AnswerSite(peers.start("a"), background=background)
    await site.open()
    readers = [asyncio.create_task(read(site)) for _ in range(2)]
    await asyncio.sleep(0)
    before = site.answer.status
    readers[0].cancel()
    await asyncio.gather(readers[0], return_exceptions=True)
    assert site.answer.status == before
    readers[1].cancel()
    await asyncio.gather(readers[1], return_exceptions=True)
    assert site.answer.status == (before if background else "suspended")


async def test_a_record_restores_the_answer_that_it_was_made_of(site: AnswerSite, peers: Peers) -> None:
    await site.open()
    site.answer.token_arrived(site.token(0, 7))
    record = site.answer.snapshot()
    assert (record.epoch, record.tokens, record.finish, record.suspended) == (1, ((7, None),), "", False)
    again = AnswerSite(peers.start("b"), epoch=record.epoch, plan=record.plan, tokens=record.tokens)
    assert again.answer.so_far() == site.answer.so_far()
    assert again.answer.machine.tokens == [7]
