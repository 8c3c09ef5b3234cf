"""One answer: what its readers see, what its stages are sent, and what its record contains."""

import asyncio
import weakref

import msgspec
import pytest

from in_process.answers import AnswerSite
from in_process.clusters import OTHER, PROMISED
from in_process.peers import Peers, until
from meshd.agents.service import Finished, TextDelta
from meshd.errors import Cancelled, DoesNotFit, InvalidSampling, MeshdError, PeerLost
from meshd.protocol.messages import Ack, Close, Error, Steps
from meshd.types import FinishReason, SamplingParams, TokenLogprobs
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
    await until(lambda: bool(site.got(Steps)))
    early = asyncio.create_task(read(site))
    await asyncio.sleep(0)
    site.answer.tokens_arrived(site.tokens(0, 7))
    site.answer.tokens_arrived(site.tokens(1, 8, finish="length"))
    text, finished = await early
    assert text == letter(7) + letter(8)
    assert finished is not None
    assert finished.reason is FinishReason.LENGTH
    assert await read(site) == (text, finished)
    assert site.events == ["opened", "token 0", "token 1", "end completed"]


async def test_several_tokens_of_one_step_are_emitted_in_order_each_with_its_logprobs(peers: Peers) -> None:
    """A repeat, or a message of which some tokens are known, adds only what is new."""
    site = AnswerSite(peers.start("a"), sampling=SamplingParams(logprobs=0))
    await site.open(10)
    first, second, third = (TokenLogprobs(-0.5 * place) for place in range(3))
    site.answer.tokens_arrived(site.tokens(0, 7, 8, logprobs=(first, second)))
    site.answer.tokens_arrived(site.tokens(0, 7, 8, logprobs=(first, second)))
    site.answer.tokens_arrived(site.tokens(1, 8, 9, logprobs=(second, third), finish="length"))
    assert site.answer.output.tokens == [(7, first), (8, second), (9, third)]
    assert site.events == ["opened", "token 0", "token 1", "token 2", "end completed"]
    finished = (await read(site))[1]
    assert finished is not None
    assert finished.reason is FinishReason.LENGTH


async def test_tokens_behind_a_stop_string_do_not_belong_to_the_answer(peers: Peers) -> None:
    site = AnswerSite(peers.start("a"), stop=(letter(8),))
    await site.open()
    site.answer.tokens_arrived(site.tokens(0, 7, 8, 9, 10, finish="length"))
    text, finished = await read(site)
    assert text == letter(7)
    assert finished is not None
    assert (finished.reason, finished.completion_tokens) == (FinishReason.STOP, 2)
    assert [token for token, _ in site.answer.snapshot().tokens] == [7, 8]


async def test_tokens_that_leave_a_gap_are_dropped_and_the_last_stage_is_avoided(site: AnswerSite) -> None:
    await site.open(10)
    site.answer.tokens_arrived(site.tokens(0, 7))
    site.answer.tokens_arrived(site.tokens(2, 8, 9))
    assert site.answer.output.tokens == [(7, None)]
    assert site.replans[-1].avoid == {site.peer.id}


async def test_the_story_names_the_numerics_of_each_plan_and_what_a_change_of_them_means(site: AnswerSite) -> None:
    first = msgspec.structs.replace(site.plan(10), numerics=(PROMISED, PROMISED))
    site.answer.planned(first)
    await site.answer.opened
    assert site.answer.numerics_header == PROMISED
    site.answer.tokens_arrived(site.tokens(0, 7))
    site.answer.tokens_arrived(site.tokens(2, 8, 9))  # a gap, which calls for another plan
    mixed = msgspec.structs.replace(site.plan(10), numerics=(PROMISED, OTHER))
    site.answer.planned(mixed)
    assert site.answer.numerics_header == f"{PROMISED}, {OTHER}"
    story = site.story.lines(site.answer.session)
    assert [line["numerics"] for line in story if line["what"] == "planned"] == [PROMISED, f"{PROMISED}, {OTHER}"]
    [change] = [line for line in story if line["what"] == "numerics change"]
    assert change["layers"] == str(mixed.stages[1].layers)
    assert "near-tie" in change["effect"]
    assert site.answer.recovery.other_numerics == (mixed.stages[1].layers,)


async def test_a_held_answer_makes_no_token_from_the_one_of_the_hold_on(site: AnswerSite) -> None:
    await site.open(10)
    site.answer.tokens_arrived(site.tokens(0, 7, 8))
    site.answer.hold(3)
    site.answer.hold(None)
    await until(lambda: len(site.got(Ack)) == 2)
    assert [(ack.stage, ack.next_seq, ack.credit) for ack in site.got(Ack)] == [(2, 2, 3), (2, 2, site.answer.machine.credit)]


async def test_a_stop_string_ends_the_answer_and_closes_its_stages(peers: Peers) -> None:
    site = AnswerSite(peers.start("a"), stop=(letter(8),))
    await site.open()
    site.answer.tokens_arrived(site.tokens(0, 7))
    site.answer.tokens_arrived(site.tokens(1, 8))
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


async def test_an_answer_that_is_kept_keeps_nothing_alive_that_its_error_has_passed(site: AnswerSite) -> None:
    class Request:
        """As a handler's local variable."""

    passed: list[weakref.ref[Request]] = []

    async def handle() -> None:
        request = Request()
        passed.append(weakref.ref(request))
        try:
            raise PeerLost("gone") from ValueError("as well")
        except PeerLost as error:
            site.answer.plan_failed(error)

    async def read_again() -> None:
        request = Request()
        passed.append(weakref.ref(request))
        with pytest.raises(PeerLost, match="gone; ask later"):
            await read(site)

    await site.open()
    site.answer.overdue("late", None)
    await handle()
    assert site.answer.status == "suspended"
    assert site.answer.error is not None
    site.answer.error.hint = "ask later"
    await read_again()
    await read_again()
    assert [each() for each in passed] == [None] * 3


async def test_a_record_restores_the_answer_that_it_was_made_of(site: AnswerSite, peers: Peers) -> None:
    await site.open()
    site.answer.tokens_arrived(site.tokens(0, 7))
    record = site.answer.snapshot()
    assert (record.epoch, record.tokens, record.finish, record.suspended) == (1, ((7, None),), "", False)
    again = AnswerSite(peers.start("b"), epoch=record.epoch, plan=record.plan, tokens=record.tokens)
    await again.answer.restore()
    assert again.answer.so_far() == site.answer.so_far()
    assert again.answer.machine.tokens == [7]


async def test_an_answer_that_is_cancelled_before_it_opens_says_so_to_its_request(site: AnswerSite) -> None:
    site.answer.end()
    with pytest.raises(Cancelled):
        await site.answer.opened


async def test_an_answer_that_is_suspended_before_it_opens_can_be_requested_again(site: AnswerSite) -> None:
    site.answer.suspend()
    with pytest.raises(MeshdError):
        await site.answer.opened


@pytest.mark.parametrize(
    ("code", "distrusted", "avoided"),
    [("out_of_memory", False, True), ("overloaded", False, True), ("superseded", False, False), ("internal_error", True, True)],
)
async def test_a_peer_that_refuses_to_open_for_lack_of_room_is_not_distrusted(
    site: AnswerSite, code: str, distrusted: bool, avoided: bool
) -> None:
    """Nor one that obeys another coordinator, which the next plan need not avoid either."""
    await site.open()
    site.reply = Error(request=0, code=code, message="no")
    site.answer.planned(site.plan(10))
    await site.answer.output.until(lambda: site.replans, 5.0)
    assert site.answer.recovery.distrusted(site.clock.now) == ({site.peer.id} if distrusted else set())
    assert site.replans[-1].avoid == ({site.peer.id} if avoided else set())


async def test_a_mistake_of_the_request_that_a_stage_finds_blames_nobody(site: AnswerSite) -> None:
    await site.open()
    site.answer.stage_failed(1, 0, InvalidSampling("not finite"), None)
    assert site.answer.recovery.distrusted(site.clock.now) == set()
    assert not site.replans[-1].avoid
