"""Batches that wait for attention of other peers: the same answers, no thread that waits, and one clear end if nobody answers."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest

from meshd.agents.stage.batch import parked as module
from meshd.agents.stage.batch.parked import MAX_PARKED
from meshd.agents.stage.flow.session import StageState
from meshd.errors import PeerLost, RemoteFailure
from meshd.kernels.backend import LoadedLayers
from meshd.protocol.messages import Failed, FetchProgress, Message, Tokens
from meshd.types import SessionId, TokenLogprobs
from shards.clients import HOLDERS, ManualShards
from shards.holders import Holders
from shards.process import Manner, ShardProcess, shard_process
from stage_mesh.driver import Driver
from stage_mesh.mesh import StageMesh, StagePeer
from stage_mesh.sessions import load, stage_of, until_empty
from tiny.llama import TinyLlama, tiny_spec

LONG = np.random.default_rng(6).integers(0, 320, 1100).tolist()
"""A prompt of two whole spans and a part of the third."""
ANSWER, BLOCKS, CAPACITY = 8, 120, 1280
TIMEOUT_S = 40.0
"""In place of `CUT_TIMEOUT_S`, so that on a busy machine no wait ends before the test moves the clock."""
SAMPLING: dict[str, Any] = {"temperature": 0.9, "seed": 5, "logprobs": 2}
MODEL = TinyLlama(tiny_spec(), kinds={"token_embd": "Q8_0"})


@pytest.fixture(scope="module")
def weights() -> Iterator[LoadedLayers]:
    loaded = load("opaque", MODEL)
    yield loaded
    loaded.close()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CUT_TIMEOUT_S", TIMEOUT_S)


@pytest.fixture(scope="module")
def process() -> Iterator[ShardProcess]:
    with shard_process(tiny_spec(), CAPACITY) as started:
        yield started


@pytest.fixture
async def attached(process: ShardProcess) -> AsyncIterator[ShardProcess]:
    process.attach()
    yield process
    process.detach()


class Session(Driver):
    """One of several sessions of a peer."""

    def __init__(self, mesh: StageMesh, at: StagePeer, number: int, prompt: list[int] = LONG, tokens: int = ANSWER) -> None:
        super().__init__(mesh, at, prompt, tokens, **SAMPLING)
        self.session = SessionId(f"{number:032x}")
        self.chunk, self.lease_ms = 128, 60_000
        self.logprobs: list[TokenLogprobs] = []

    def _on_message(self, sender: Any, message: Message) -> None:
        if getattr(message, "session", self.session) == self.session:
            super()._on_message(sender, message)
        if isinstance(message, Tokens) and message.session == self.session:
            self.logprobs += message.logprobs

    @property
    def failures(self) -> list[Failed]:
        return [failed for failed in self.at.received(Failed) if failed.session == self.session]

    @property
    def result(self) -> tuple[list[int], list[TokenLogprobs]]:
        return self.tokens, self.logprobs


_undisturbed: dict[Any, Any] = {}


async def undisturbed(mesh: StageMesh, prompt: list[int] = LONG, tokens: int = ANSWER) -> Any:
    """Return the tokens and logprobs of a session whose KV is all here; computed once for each backend."""
    key = id(mesh.weights), len(prompt), tokens
    if key not in _undisturbed:
        alone = mesh.start("z", blocks=BLOCKS)
        session = Session(mesh, alone, 99, prompt, tokens)
        await session.begin((alone, "0-4"))
        await session.wait_tokens(tokens)
        await session.close(alone)
        _undisturbed[key] = session.result
    return _undisturbed[key]


def manual(*peers: StagePeer, **options: Any) -> ManualShards:
    shards = ManualShards(Holders(tiny_spec(), CAPACITY))
    shards.serve(*peers, **options)
    return shards


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def answering(session: Driver, shards: ManualShards) -> None:
    """Answer requests until the session has all its tokens."""
    async with asyncio.timeout(20):
        while len(session.tokens) < session.max_tokens:
            shards.answer_all()
            await asyncio.sleep(0.002)


@pytest.mark.parametrize(
    "manner",
    [Manner(), Manner(5), Manner(50), Manner(30, shuffled=True), Manner(2, times=2)],
    ids=["at once", "5 ms", "50 ms", "out of order", "twice"],
)
async def test_a_shard_in_another_process_changes_no_bit(mesh: StageMesh, attached: ShardProcess, manner: Manner) -> None:
    attached.manner, attached.in_order, before = manner, True, attached.answers
    a, b = mesh.start("a", blocks=BLOCKS), mesh.start("b", blocks=BLOCKS)
    for peer in (a, b):
        peer.host._opener.shards_of = attached.client
    session = Session(mesh, a, 1 + round(manner.delay_ms) + manner.times)
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.wait_tokens(ANSWER)
    assert session.result == await undisturbed(mesh)
    asked = 3 * 9 + 2 * ANSWER
    assert attached.answers - before >= asked * manner.times
    assert attached.in_order or manner.shuffled or manner.times > 1
    assert not (attached.in_order and manner.shuffled)
    await session.close(a, b)
    await until_empty(mesh)


async def test_a_shard_that_never_answers_ends_its_session_only(mesh: StageMesh, attached: ShardProcess) -> None:
    attached.manner = Manner(times=0)
    a = mesh.start("a", blocks=BLOCKS)
    waits, goes_on = Session(mesh, a, 1), Session(mesh, a, 2)
    a.host._opener.shards_of = lambda message: attached.client(message) if message.session == waits.session else None
    await waits.begin((a, "0-4"))
    await until(lambda: a.host._runner.parked.jobs)
    await goes_on.begin((a, "0-4"))
    await goes_on.wait_tokens(ANSWER)
    assert goes_on.result == await undisturbed(mesh)
    assert not waits.failures
    mesh.clock.ahead += TIMEOUT_S
    await until(lambda: waits.failures)
    (failed,) = waits.failures
    assert (failed.code, failed.blame) == ("peer_lost", HOLDERS[1])
    assert "has not answered for" in failed.message
    await waits.close(a)
    await goes_on.close(a)
    await until_empty(mesh)
    assert not a.host._runner.parked.jobs


async def test_sessions_that_wait_share_the_compute_thread(mesh: StageMesh) -> None:
    """Three sessions with KV elsewhere and two without, in several batches at once; each gets the answer that it gets alone."""
    a = mesh.start("a", blocks=3 * BLOCKS)
    sessions = [Session(mesh, a, number, LONG[: 1100 - 60 * number]) for number in range(5)]
    shards = manual(a, only={session.session for session in sessions[:3]})
    most = 0
    for session in sessions:
        await session.begin((a, "0-4"))
    async with asyncio.timeout(30):
        while any(len(session.tokens) < ANSWER for session in sessions):
            most = max(most, len(a.host._runner.parked.jobs))
            shards.answer_all()
            await asyncio.sleep(0.004)
    for number, session in enumerate(sessions):
        right = await undisturbed(mesh, LONG[: 1100 - 60 * number])
        assert session.tokens == right[0]
        assert session.logprobs == right[1]
    assert most > 1, "several batches waited at once"
    for session in sessions:
        await session.close(a)
    await until_empty(mesh)


async def parked_pair(mesh: StageMesh) -> tuple[StagePeer, ManualShards, Session, Session]:
    """Park one batch with the decode steps of two sessions."""
    a = mesh.start("a", blocks=2 * BLOCKS)
    one, two = Session(mesh, a, 1), Session(mesh, a, 2)
    shards = manual(a)
    for session in (one, two):
        session.credit = 2
        await session.begin((a, "0-4"))
    async with asyncio.timeout(20):
        while min(len(one.tokens), len(two.tokens)) < 2:
            shards.answer_all()
            await asyncio.sleep(0.002)
    hold, loop = asyncio.Event(), asyncio.get_running_loop()
    a.compute.submit(lambda: asyncio.run_coroutine_threadsafe(hold.wait(), loop).result(), lambda _: None, lambda _: None)
    first = Session(mesh, a, 3, LONG[:40], 1)  # its pass waits behind `hold`, so that the two steps become ready behind it
    a.host._opener.shards_of = lambda message: None
    await first.begin((a, "0-4"))
    await until(lambda: a.host._runner.job is not None)
    for session in (one, two):
        session.grant(ANSWER)
    await until(lambda: all(a.host._active[each.session, 0].machine.state is StageState.READY for each in (one, two)))
    hold.set()
    await until(lambda: len(shards.asked) == 2)
    (job,) = a.host._runner.parked.jobs
    assert len(job.batch) == 2
    await first.close(a)
    return a, shards, one, two


@pytest.mark.parametrize(
    ("end", "code"),
    [("close", ""), ("refusal", RemoteFailure.code), ("not finite", "protocol_violation"), ("deadline", "peer_lost")],
)
async def test_a_session_that_ends_in_a_parked_batch_leaves_the_other_alone(mesh: StageMesh, end: str, code: str) -> None:
    a, shards, one, two = await parked_pair(mesh)
    (mine,) = [asked for asked in shards.asked if asked.session == one.session]
    shards.asked.remove(mine)
    match end:
        case "close":
            await one.close(a)
        case "refusal":
            mine.answer(RemoteFailure("the holder has no room", remote_code="out_of_memory"))
        case "not finite":
            o, lse = shards.part(mine)
            mine.answer((np.full_like(o, np.nan), lse))
        case "deadline":
            shards.answer_all()
            mesh.clock.ahead += TIMEOUT_S
    if code:
        await until(lambda: one.failures)
        assert [(failed.code, failed.blame) for failed in one.failures] == [(code, HOLDERS[1])]
    mine.answer(shards.part(mine))  # too late: nobody waits for it
    await answering(two, shards)
    assert two.tokens == (await undisturbed(mesh))[0]
    assert not two.failures
    await one.close(a)
    await two.close(a)
    await until_empty(mesh)
    assert not a.host._runner.parked.jobs


async def test_sessions_end_with_the_link_to_the_holder_of_their_kv(mesh: StageMesh) -> None:
    a, _, one, two = await parked_pair(mesh)
    a.host.on_peer_gone(HOLDERS[1], "cut")
    for session in (one, two):
        await until(lambda session=session: session.failures)
        assert [(failed.code, failed.blame) for failed in session.failures] == [("peer_lost", HOLDERS[1])]
        assert "holds a part of its KV is down" in session.failures[0].message
        await session.close(a)
    await until_empty(mesh)
    assert not a.host._runner.parked.jobs


async def test_a_session_that_is_closed_while_it_waits_frees_its_memory_at_once(mesh: StageMesh) -> None:
    a = mesh.start("a", blocks=BLOCKS)
    shards, session = manual(a), Session(mesh, a, 1)
    await session.begin((a, "0-4"))
    await until(lambda: shards.asked)
    await session.close(a)
    assert not a.host._runner.parked.jobs
    await until_empty(mesh)
    shards.answer_all()
    assert a.host._runner.job is None


async def test_the_number_of_batches_that_wait_is_bounded(mesh: StageMesh) -> None:
    a = mesh.start("a", blocks=6 * BLOCKS)
    sessions = [Session(mesh, a, number, LONG[:200]) for number in range(MAX_PARKED + 3)]
    shards = manual(a, only={session.session for session in sessions[:-1]})
    for session in sessions[:-1]:
        await session.begin((a, "0-4"))
    parked = a.host._runner.parked
    await until(lambda: parked.full)
    await sessions[-1].begin((a, "0-4"))
    await sessions[-1].wait_tokens(ANSWER)
    assert len(parked.jobs) == MAX_PARKED, "only a session whose KV is all here was computed meanwhile"
    for session in sessions[:-1]:
        await answering(session, shards)
        assert session.tokens == sessions[-1].tokens
    assert not parked.jobs


async def test_a_request_that_can_not_be_sent_is_the_holders_fault(mesh: StageMesh) -> None:
    a = mesh.start("a", blocks=BLOCKS)
    shards, session = manual(a), Session(mesh, a, 1)
    shards.refusal = PeerLost("no link with the holder")
    await session.begin((a, "0-4"))
    await until(lambda: session.failures)
    assert [(failed.code, failed.blame) for failed in session.failures] == [("peer_lost", HOLDERS[1])]
    await session.close(a)
    await until_empty(mesh)


async def test_answers_that_come_while_the_request_is_sent_are_taken(mesh: StageMesh) -> None:
    a = mesh.start("a", blocks=BLOCKS)
    shards, session = manual(a), Session(mesh, a, 1)
    shards.eager = True
    await session.begin((a, "0-4"))
    await session.wait_tokens(ANSWER)
    assert session.result == await undisturbed(mesh)


async def test_waiting_is_not_computing(mesh: StageMesh) -> None:
    """A step that waits is no overdue step of this peer, and its time does not enter the predictions."""
    a = mesh.start("a", blocks=BLOCKS)
    shards, session = manual(a), Session(mesh, a, 1)
    await session.begin((a, "0-4"))
    await until(lambda: shards.asked)

    async def running_s() -> float:
        message = FetchProgress(request=a.links.next_request(), session=session.session, epoch=1)
        reply, _ = await a.links.request(a.id, message, timeout_s=5)
        assert reply.running.session == session.session
        assert reply.stages[0].sent < reply.stages[0].due
        return float(reply.running.running_s)

    first = await running_s()
    mesh.clock.ahead += 4
    assert await running_s() == first
    learned = a.host.learning.learned()
    await answering(session, shards)
    assert a.host.learning.learned() == learned
    metrics = a.host.telemetry.registry
    assert metrics.get_sample_value("meshd_cut_wait_seconds_count") == 3 * (9 + ANSWER - 1)
    waited_s = metrics.get_sample_value("meshd_cut_wait_seconds_sum")
    assert waited_s is not None
    assert waited_s > 4
    busy_s = metrics.get_sample_value("meshd_stage_seconds_sum", {"model": "tiny", "layers": "0-4", "phase": "prefill"})
    assert busy_s is not None
    assert busy_s < 4
    assert stage_of(a).machine.state is StageState.IDLE


async def test_only_the_first_answer_counts(mesh: StageMesh) -> None:
    a = mesh.start("a", blocks=BLOCKS)
    shards, session = manual(a), Session(mesh, a, 1)
    await session.begin((a, "0-4"))
    async with asyncio.timeout(30):
        while len(session.tokens) < ANSWER:
            waiting, shards.asked = shards.asked, []
            for asked in waiting:
                asked.answer(shards.part(asked))
                asked.answer(RemoteFailure("the holder has no room", remote_code="out_of_memory"))
            await asyncio.sleep(0.002)
    assert session.result == await undisturbed(mesh)
    assert not session.failures
