"""Real stages with a small model: sessions go on after losses and moves with the same tokens, and nothing stays behind."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from in_process.stage_mesh import SESSION, Driver, StageMesh, StagePeer
from meshd.agents.stage.session import StageState
from meshd.errors import RemoteFailure
from meshd.kernels.backend import LoadedLayers
from meshd.kernels.registry import make_backend
from meshd.protocol.messages import (
    Activation,
    Close,
    Closed,
    Failed,
    FetchProgress,
    KvBlocks,
    KvOffer,
    KvStored,
    Mirrored,
    Prompt,
    Resume,
    Taken,
    Token,
)
from meshd.types import LayerRange
from tiny.llama import TinyLlama, tiny_spec

MODEL = TinyLlama(tiny_spec(tied=True), kinds={"token_embd": "Q8_0"})
PROMPT = np.random.default_rng(4).integers(0, 320, 40).tolist()
ANSWER = 60


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def weights(request: pytest.FixtureRequest) -> Iterator[LoadedLayers]:
    loaded = make_backend(request.param, threads=1).load(MODEL.spec, LayerRange(0, 4), MODEL, embedding=True, head=True)
    yield loaded
    loaded.close()


@pytest.fixture
async def mesh(weights: LoadedLayers) -> AsyncIterator[StageMesh]:
    async with StageMesh(MODEL.spec, weights) as started:
        yield started


@pytest.fixture(autouse=True)
def no_surprise(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A handler that fails otherwise than on purpose only logs it."""
    yield
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def driver(mesh: StageMesh, at: StagePeer, max_tokens: int = ANSWER, **sampling: Any) -> Driver:
    return Driver(mesh, at, PROMPT, max_tokens, **sampling)


async def expected(mesh: StageMesh, **sampling: Any) -> list[int]:
    """What an undisturbed session gives."""
    alone = mesh.start("z")
    session = driver(mesh, alone, **sampling)
    await session.begin((alone, "0-4"))
    await session.made(ANSWER)
    await session.close(alone)
    return session.tokens


async def until_empty(mesh: StageMesh) -> None:
    """Nothing is held by anybody: no block, no output, no session on a load."""
    try:
        async with asyncio.timeout(5):
            while any(leftovers(peer) for peer in mesh.peers.values()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(str([leftovers(peer) for peer in mesh.peers.values()]))


def leftovers(peer: StagePeer) -> dict[str, Any]:
    caches = peer.host._caches
    found = {
        "blocks": peer.pool.blocks - peer.pool.blocks_free,
        "load": peer.load.sessions,
        "outputs": caches.outputs.used_bytes,
        "logs": len(caches.outputs._logs),
        "kept": list(caches),
        "active": peer.host._active,
        "copies": peer.host._mirrors_out._all(),
    }
    return {name: what for name, what in found.items() if what}


def sent_tokens(peer: StagePeer, kind: type = Activation) -> int:
    return sum(message.tokens for _, message in peer.links.sent if isinstance(message, kind))


# One epoch


@pytest.mark.parametrize("cuts", [("0-4",), ("0-1", "1-4"), ("0-1", "1-2", "2-4")])
async def test_any_cut_gives_the_same_tokens_and_close_frees_all(mesh: StageMesh, cuts: tuple[str, ...]) -> None:
    peers = [mesh.start(name) for name in "abc"[: len(cuts)]]
    session = driver(mesh, peers[0])
    await session.begin(*zip(peers, cuts, strict=True))
    await session.made(ANSWER)
    assert session.tokens == await expected(mesh)
    await session.close(*peers)
    assert sum(told.freed_blocks for told in peers[0].told(Closed)) == 4 * len(peers)
    await until_empty(mesh)


async def test_two_stages_at_one_peer(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    await session.begin((a, "0-1"), (b, "1-2"), (a, "2-3"), (a, "3-4"))
    await session.made(ANSWER)
    assert session.tokens == await expected(mesh)
    await session.close(a, b)
    await until_empty(mesh)


# A later epoch


async def test_a_lost_stage_is_computed_again_from_kept_outputs(mesh: StageMesh) -> None:
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a, temperature=0.9, seed=3)
    session.credit = 20
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.made(20)
    mesh.kill(b)
    await session.until(lambda: a.told(Failed))
    (failed,) = a.told(Failed)
    assert (failed.code, failed.blame) == ("peer_lost", b.id)
    assert a.pool.blocks_free < a.pool.blocks, "the stage's KV stays"

    session.credit = ANSWER
    await session.go_on((a, "0-2"), (c, "2-4"))
    assert [told.held for told in session.opens] == [59, 0]
    assert (session.opens[0].kept_from, session.opens[0].kept_to) == (0, 59)
    assert [position.start for position in session.positions] == [59, 0], "the surviving stage computes one token"
    await session.made(ANSWER)
    assert session.tokens == await expected(mesh, temperature=0.9, seed=3)
    await session.close(a, c)
    mesh.clock.ahead += 61  # for the lost peer, which nobody can tell
    await until_empty(mesh)


async def test_a_replay_keeps_to_the_window(mesh: StageMesh) -> None:
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a)
    session.credit, session.chunk = 20, 3
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.made(20)
    mesh.kill(b)
    a.links.sent.clear()
    await session.go_on((a, "0-2"), (c, "2-4"))
    on_the_way = most = 0
    seen = 0

    def look() -> None:
        nonlocal on_the_way, most, seen
        for _, message in a.links.sent[seen:]:
            if isinstance(message, Activation) and message.step < session.known:
                on_the_way += 1
                most = max(most, on_the_way)
        seen = len(a.links.sent)

    on_taken = a.host._on_taken

    def taken(sender: Any, message: Taken, payload: memoryview) -> None:
        nonlocal on_the_way
        look()
        on_the_way -= 1
        on_taken(sender, message, payload)

    a.links.dispatcher._handlers[Taken] = taken
    session.grant(ANSWER)
    await session.made(ANSWER)
    assert most == 4
    replayed = [message for _, message in a.links.sent if isinstance(message, Activation) and message.step < 59]
    assert [message.tokens for message in replayed] == [3] * 19 + [2]
    assert session.tokens == await expected(mesh)


async def test_a_lost_first_stage_is_computed_again_and_its_output_is_not_sent_twice(mesh: StageMesh) -> None:
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    session = driver(mesh, b)
    session.credit = 20
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.made(20)
    mesh.kill(a)
    session.credit = ANSWER
    await session.go_on((c, "0-2"), (b, "2-4"))
    assert [(position.start, position.send_from) for position in session.positions] == [(0, 59), (59, 59)]
    await session.made(ANSWER)
    assert sent_tokens(c) == ANSWER - 20, "one token a step, none of the prefill"
    assert session.tokens == await expected(mesh)


async def test_without_kept_outputs_all_is_computed_again(mesh: StageMesh) -> None:
    a, b, c = mesh.start("a", outputs=1000), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a)
    session.credit = 20
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.made(20)
    mesh.kill(b)
    session.credit = ANSWER
    await session.go_on((a, "0-2"), (c, "2-4"))
    assert session.opens[0].held == 59
    assert session.opens[0].kept_from > 0
    assert [position.start for position in session.positions] == [0, 0]
    await session.made(ANSWER)
    assert session.tokens == await expected(mesh)


async def test_penalties_go_on_with_the_tokens_that_were_there(mesh: StageMesh) -> None:
    penalties = {"temperature": 0.8, "seed": 1, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.4}
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a, **penalties)
    session.credit = 20
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.made(20)
    mesh.kill(b)
    session.credit = ANSWER
    await session.go_on((a, "0-2"), (c, "2-4"))
    await session.made(ANSWER)
    assert session.tokens == await expected(mesh, **penalties)


async def test_a_stage_that_is_cut_in_two_at_its_peer_keeps_its_kv_in_one_table(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, b)
    session.credit = 20
    await session.begin((a, "0-3"), (b, "3-4"))
    await session.made(20)
    used = a.pool.blocks - a.pool.blocks_free
    session.credit = 40
    await session.go_on((a, "0-2"), (a, "2-3"), (b, "3-4"))
    assert [told.held for told in session.opens] == [59, 59, 59]
    assert session.opens[1].kept_to == 59, "the outputs are those of the stage that ends at the same layer"
    assert session.opens[0].kept_to == 0
    assert a.pool.blocks - a.pool.blocks_free == used
    await session.made(40)
    session.credit = ANSWER
    await session.go_on((a, "0-2"), (b, "2-3"), (b, "3-4"))  # and one of them goes elsewhere
    assert [told.held for told in session.opens] == [79, 0, 79]
    await session.made(ANSWER)
    assert session.tokens == await expected(mesh)
    await session.close(a, b)
    await until_empty(mesh)


async def test_what_no_stage_of_the_new_epoch_uses_is_freed_at_resume_and_not_before(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, b)
    session.credit = 10
    await session.begin((a, "0-2"), (a, "2-4"))
    await session.made(10)
    used = a.pool.blocks - a.pool.blocks_free
    await session.open((a, "0-2"), (b, "2-4"), resume=True)
    assert a.pool.blocks - a.pool.blocks_free == used
    session.resume()
    await session.until(lambda: a.pool.blocks - a.pool.blocks_free == used // 2)
    session.grant(ANSWER)
    await session.made(ANSWER)
    assert session.tokens == await expected(mesh)


async def test_an_epoch_that_never_got_under_way_costs_nothing(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    session.credit = 10
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.made(10)
    await session.open((a, "0-2"), (b, "2-4"), resume=True)
    await session.open((a, "0-1"), (a, "1-2"), (b, "2-4"), resume=True)
    session.credit = ANSWER
    await session.go_on((a, "0-2"), (b, "2-4"))
    assert [(told.held, told.kept_to) for told in session.opens] == [(49, 49), (49, 0)]
    await session.made(ANSWER)
    assert session.tokens == await expected(mesh)
    await session.close(a, b)
    await until_empty(mesh)


async def test_kept_outputs_that_were_offered_stay_until_they_are_sent(mesh: StageMesh) -> None:
    a, b, c = mesh.start("a", outputs=60_000), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a)
    session.credit = 20
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.made(20)
    mesh.kill(b)
    session.credit = ANSWER
    await session.open((a, "0-2"), (c, "2-4"), resume=True)
    assert session.opens[0].kept_to == 59
    other = driver(mesh, c)
    other.session = type(SESSION)("6" * 32)
    await other.begin((a, "0-2"), (c, "2-4"))
    await other.made(ANSWER)
    session.resume()
    await session.made(ANSWER)
    assert session.tokens == other.tokens == await expected(mesh)
    assert [failed.epoch for failed in a.told(Failed)] == [1]


async def test_a_stage_answers_where_it_is(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    session.credit = 10
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.made(10)
    await session.until(lambda: a.host._active[SESSION, 0].machine.state is StageState.WAITING)

    async def where(peer: StagePeer, epoch: int) -> tuple[Any, ...]:
        def asking(request: int) -> FetchProgress:
            return FetchProgress(request=request, session=SESSION, epoch=epoch)

        return (await a.links.request(peer.id, asking, timeout_s=1))[0].stages

    assert await where(a, 1) == ((0, 50, 49, 0.0),), "one step waits for credit"
    assert await where(b, 1) == ((1, 49, 49, 0.0),)
    assert await where(b, 2) == ()


# Faults


def stage_of(peer: StagePeer) -> Any:
    (active,) = peer.host._active.values()
    return active


async def test_hidden_states_that_are_not_finite_are_the_senders_fault(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    await session.open((a, "0-2"), (b, "2-4"))
    bad = np.full((1, 128), np.nan, np.float32)
    message = Activation(session=SESSION, epoch=1, step=0, stage=1, tokens=1, hidden=128, dtype="f32", sample=False)
    a.links.send(b.id, message, bad.data.cast("B"))
    await session.until(lambda: a.told(Failed))
    (failed,) = a.told(Failed)
    assert (failed.blame, failed.stage) == (a.id, 1)
    assert "not finite" in failed.message


async def test_what_a_stage_makes_of_finite_states_is_its_own_fault(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, b)
    await session.open((a, "0-2"), (b, "2-4"))
    stage = stage_of(a).stage

    class Broken:
        layers, embed = stage.layers, stage.embed

        def forward(self, hidden: Any, *rest: Any) -> Any:
            return stage.forward(hidden, *rest) * np.float32(np.inf)

    stage_of(a).stage = Broken()
    session.send_prompt()
    await session.until(lambda: b.told(Failed))
    assert b.told(Failed)[0].blame == a.id
    assert not sent_tokens(a), "nothing of it goes out"


@pytest.mark.parametrize(
    ("changes", "payload", "told"),
    [({"step": 3}, 512, "came where 0 was due"), ({"tokens": 2}, 512, "torn"), ({"hidden": 64}, 256, "torn")],
)
async def test_a_step_that_can_not_be_is_the_senders_fault(
    mesh: StageMesh, changes: dict[str, int], payload: int, told: str
) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    await session.open((a, "0-2"), (b, "2-4"))
    message = Activation(session=SESSION, epoch=1, step=0, stage=1, tokens=1, hidden=128, dtype="f32", sample=False)
    a.links.send(b.id, msgspec.structs.replace(message, **changes), bytes(payload))
    await session.until(lambda: a.told(Failed))
    (failed,) = a.told(Failed)
    assert failed.blame == a.id
    assert told in failed.message


@pytest.mark.parametrize("token", [-1, 2**30])
async def test_a_token_outside_the_vocabulary_is_its_senders_fault(mesh: StageMesh, token: int) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    await session.open((a, "0-2"), (b, "2-4"))
    b.links.send(a.id, Token(session=SESSION, epoch=1, step=5, index=0, token=token))
    await session.until(lambda: a.told(Failed))
    assert a.told(Failed)[0].blame == b.id


async def test_a_resume_that_can_not_be_is_the_coordinators_fault(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    await session.open((b, "0-4"), resume=True)
    session.send(0, Resume, stage=0, start=5, send_from=0)
    await session.until(lambda: a.told(Failed))
    assert a.told(Failed)[0].blame == a.id
    await session.close(b)
    await until_empty(mesh)


async def test_a_restarted_peer_is_noticed_by_its_answer_to_renew(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    session.epoch = 4
    session.renew(b)
    await session.until(lambda: a.told(Failed))
    (failed,) = a.told(Failed)
    assert (failed.epoch, failed.code, failed.blame) == (4, "peer_lost", b.id)


# Who coordinates


async def refused(session: Driver, *stages: tuple[StagePeer, str], **changes: Any) -> str:
    with pytest.raises(RemoteFailure) as caught:
        await session.open(*stages, **changes)
    return str(caught.value)


async def test_another_coordinator_takes_over_only_when_the_first_is_gone_or_gave_it_away(mesh: StageMesh) -> None:
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    first, second = driver(mesh, a), driver(mesh, b)
    first.credit = 10
    await first.begin((c, "0-4"))
    await first.made(10)
    second.tokens, second.epoch = list(first.tokens), 1
    assert a.id in await refused(second, (c, "0-4"), resume=True)
    second.epoch = 0
    assert a.id in await refused(second, (c, "0-4"), resume=True, handed_over=True), "the same epoch"
    mesh.cut(a, c)
    await second.go_on((c, "0-4"))
    second.grant(ANSWER)
    await second.made(ANSWER)
    assert second.tokens == await expected(mesh)
    third = driver(mesh, a)
    mesh.down.clear()
    third.tokens, third.epoch = second.tokens[:30], 2
    await third.go_on((c, "0-4"), handed_over=True)
    await third.made(ANSWER)
    assert third.tokens == second.tokens
    second.renew(c)
    assert not b.told(Failed)


async def test_a_past_epoch_and_a_stage_that_failed_are_refused(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    session.epoch = 4
    await session.open((b, "0-4"))
    session.epoch = 2
    assert "epoch 3 is past" in await refused(session, (b, "0-4"))
    session.epoch = 6
    b.host._runner.fail(stage_of(b), 0, RemoteFailure("a test", remote_code="test"), a.id)
    assert (await session.open_stage(0, resume=True)).held == 0
    b.host._runner.fail(stage_of(b), 0, RemoteFailure("a test", remote_code="test"), a.id)
    with pytest.raises(RemoteFailure, match="has failed in epoch 6"):
        await session.open_stage(0, resume=True)
    await session.close(b)
    await until_empty(mesh)


async def test_a_repeated_open_is_answered_alike(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    session.credit = 5
    await session.begin((b, "0-4"))
    await session.made(5)
    await session.open((b, "0-4"), resume=True)
    again = await session.open_stage(0, resume=True)
    assert msgspec.structs.replace(again, request=0) == msgspec.structs.replace(session.opens[0], request=0)
    assert again.held == 44
    assert again.blocks == 4


async def test_a_first_epoch_again_drops_what_the_one_before_left(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b", blocks=4)
    session = driver(mesh, a)
    await session.open((b, "0-4"))
    await session.begin((b, "0-4"))  # there is room for one of them only
    await session.made(ANSWER)


async def test_an_open_that_needs_tokens_and_has_none_is_refused(mesh: StageMesh) -> None:
    a = mesh.start("a")
    session = driver(mesh, a, repetition_penalty=1.5)
    session.plan, session.epoch = session.plan_of((a, "0-4")), 1
    for payload in (None, bytes(8), np.full(len(PROMPT), 320, "<i4").data.cast("B")):
        with pytest.raises(RemoteFailure, match="token ids"):
            await a.links.request(a.id, session.opening(0, resume=False), payload, timeout_s=1)
    await until_empty(mesh)


# Leases


async def test_a_lease_that_runs_out_frees_everything(mesh: StageMesh) -> None:
    a, b, c, d = (mesh.start(name) for name in "abcd")
    session = driver(mesh, a)
    session.credit = 20
    await session.begin((b, "0-2"), (c, "2-4"))
    await session.made(20)
    session.mirror(1, d)
    await session.until(lambda: any(told.held for told in a.told(Mirrored)))
    mesh.clock.ahead += 9
    session.renew(b, c)
    await asyncio.sleep(0.1)
    mesh.clock.ahead += 9
    await session.until(lambda: not leftovers(d))
    assert leftovers(b)
    assert leftovers(c)
    assert not a.told(Failed)
    mesh.clock.ahead += 9
    await until_empty(mesh)


async def test_what_a_failed_stage_left_goes_with_the_lease(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    session.credit = 20
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.made(20)
    mesh.cut(a, b)
    assert a.host.sessions == b.host.sessions == 0
    assert leftovers(a)
    assert leftovers(b)
    mesh.clock.ahead += 11
    await until_empty(mesh)


async def test_no_lease_is_longer_than_a_minute(mesh: StageMesh) -> None:
    a = mesh.start("a")
    session = driver(mesh, a)
    session.lease_ms = 10**9
    await session.begin((a, "0-4"))
    mesh.clock.ahead += 61
    await until_empty(mesh)


# Copies


async def test_a_mirror_takes_over_with_the_same_tokens(mesh: StageMesh) -> None:
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a, temperature=0.7, seed=9)
    session.credit = 30
    await session.begin((a, "0-2"), (b, "2-4"))
    session.mirror(1, c)
    await session.made(30)
    await session.until(lambda: any(told.held >= 40 for told in a.told(Mirrored)))
    assert c.host.rows(lambda model: "tiny")[0]["role"] == "mirror 2-4"
    assert c.host.sessions == 0
    mesh.kill(b)
    session.credit = ANSWER
    await session.go_on((a, "0-2"), (c, "2-4"))
    there = session.opens[1].held
    assert session.opens[1].mirrored
    assert 69 - 32 < there < 69, "a mirror lacks less than a block"
    assert [position.start for position in session.positions] == [69, there]
    await session.made(ANSWER)
    assert session.tokens == await expected(mesh, temperature=0.7, seed=9)
    await session.close(a, c)
    mesh.clock.ahead += 61
    await until_empty(mesh)


async def test_a_move_copies_while_decoding_goes_on(mesh: StageMesh) -> None:
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a)
    session.credit = 30
    await session.begin((b, "0-2"), (a, "2-4"))
    await session.made(20)
    session.mirror(0, c, eager=True)
    await session.made(30)
    await session.until(lambda: a.told(Mirrored) and b.host._mirrors_out._all()[0].machine.held == 69)
    session.credit = ANSWER
    await session.go_on((c, "0-2"), (a, "2-4"))
    assert [told.held for told in session.opens] == [69, 69]
    assert [position.start for position in session.positions] == [69, 69]
    a.links.send(b.id, Close(session=SESSION, epoch=1, reason="moved"))
    await session.until(lambda: not leftovers(b))
    await session.made(ANSWER)
    assert session.tokens == await expected(mesh)
    await session.close(a, c)
    await until_empty(mesh)


async def test_a_move_there_and_back_sends_only_what_is_new(mesh: StageMesh) -> None:
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a)
    session.credit = 20
    await session.begin((b, "0-4"))
    await session.made(20)
    session.mirror(0, c, eager=True)
    await session.until(lambda: c.told(KvBlocks) or any(told.held == 59 for told in a.told(Mirrored)))
    session.credit = 40
    await session.go_on((c, "0-4"))
    await session.made(40)
    session.mirror(0, b, eager=True)  # which still has what it computed itself
    await session.until(lambda: any(told.held == 79 and told.target == b.id for told in a.told(Mirrored)))
    assert sent_tokens(c, KvBlocks) == 79 - 59
    assert b.pool.blocks - b.pool.blocks_free == 4
    session.credit = ANSWER
    await session.go_on((b, "0-4"))
    await session.made(ANSWER)
    assert session.tokens == await expected(mesh)
    await session.close(b, c)
    await until_empty(mesh)


async def test_a_copy_at_a_peer_of_the_plan_outlives_one_change_of_plan_without_an_offer(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    session.credit = 20
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.made(20)
    session.mirror(1, a, eager=True)
    await session.until(lambda: any(told.held == 59 for told in a.told(Mirrored)))
    session.credit = 30
    await session.go_on((a, "0-2"), (b, "2-4"))
    await session.made(30)
    b.links.sent.clear()
    session.mirror(1, a, eager=True)
    await session.until(lambda: any(told.epoch == 2 and told.held == 69 for told in a.told(Mirrored)))
    assert [message.position for _, message in b.links.sent if isinstance(message, KvBlocks)] == [59]
    for _ in range(2):
        assert [row["role"] for row in a.host.rows(lambda model: "tiny")] == ["stage 0", "mirror 2-4"]
        await session.go_on((a, "0-2"), (b, "2-4"))
    await session.until(lambda: [row["role"] for row in a.host.rows(lambda model: "tiny")] == ["stage 0"])
    session.grant(ANSWER)
    await session.made(ANSWER)
    assert session.tokens == await expected(mesh)


async def test_what_a_copy_has_beyond_the_start_of_an_epoch_is_sent_again(mesh: StageMesh) -> None:
    """The stages may have been further than the coordinator knew; on some backends not with the same tokens."""
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a)
    session.credit = 30
    await session.begin((b, "0-4"))
    session.mirror(0, c, eager=True)
    await session.until(lambda: b.host._mirrors_out._all() and b.host._mirrors_out._all()[0].machine.held == 69)
    session.tokens = session.tokens[:10]
    session.credit = 12
    await session.go_on((b, "0-4"))
    await session.made(12)
    b.links.sent.clear()
    session.mirror(0, c, eager=True)
    await session.until(lambda: c.host.rows(lambda model: "tiny")[0]["tokens"] == 51)
    (offer,) = [message for _, message in b.links.sent if isinstance(message, KvOffer)]
    assert offer.valid == 49
    assert [message.position for _, message in b.links.sent if isinstance(message, KvBlocks)] == [49]


async def test_a_copy_that_can_not_be_made_is_told_and_the_stage_serves_on(mesh: StageMesh) -> None:
    a, b, c, d = mesh.start("a"), mesh.start("b"), mesh.start("c", "0-2"), mesh.start("d", blocks=2)
    session = driver(mesh, a)
    await session.begin((b, "0-4"))
    for target, told in ((c, "does not have layers 0-4"), (d, "no KV for"), (b, "own peer")):
        session.mirror(0, target)
        await session.until(lambda target=target: [m for m in a.told(Mirrored) if m.target == target.id])
        assert told in a.told(Mirrored)[-1].error
    await session.made(ANSWER)
    assert session.tokens == await expected(mesh)
    await session.close(b)
    await until_empty(mesh)


async def test_a_copy_ends_with_the_link_to_its_target_and_its_cache_with_the_lease(mesh: StageMesh) -> None:
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a)
    session.credit = 20
    await session.begin((b, "0-4"))
    session.mirror(0, c)
    await session.made(20)
    mesh.cut(b, c)
    await session.until(lambda: any(told.error for told in a.told(Mirrored)))
    assert leftovers(c)
    session.grant(ANSWER)
    await session.made(ANSWER)
    assert session.tokens == await expected(mesh)
    await session.close(b, c)
    await until_empty(mesh)


async def test_a_mirror_that_is_stopped_takes_no_more(mesh: StageMesh) -> None:
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a)
    session.credit = 10
    await session.begin((b, "0-4"))
    await session.made(10)
    session.mirror(0, c, eager=True)
    await session.until(lambda: any(told.held == 49 for told in a.told(Mirrored)))
    session.mirror(0, None)
    session.grant(ANSWER)
    await session.made(ANSWER)
    assert c.host.rows(lambda model: "tiny")[0]["tokens"] == 49


@pytest.mark.parametrize(
    ("changes", "payload"), [({}, 100), ({"tokens": 0}, 0), ({"tokens": 129}, 129 * 2048), ({}, -1), ({"position": -1}, 2048)]
)
async def test_a_broken_piece_ends_the_copy(mesh: StageMesh, changes: dict[str, int], payload: int) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    offer = KvOffer(
        request=1,
        session=SESSION,
        epoch=1,
        coordinator=a.id,
        model=b.load.card.id,
        layers=LayerRange(0, 4),
        tokens=128,
        lease_ms=10_000,
    )
    reply, _ = await a.links.request(b.id, offer, timeout_s=1)
    assert reply.held == 0
    told: list[KvStored] = []
    a.links.dispatcher._handlers[KvStored] = lambda sender, message, rest: told.append(message)
    data = np.full(2048, np.nan, "<f4").tobytes() if payload < 0 else bytes(payload)
    blocks = KvBlocks(session=SESSION, epoch=1, layers=LayerRange(0, 4), position=0, tokens=1)
    a.links.send(b.id, msgspec.structs.replace(blocks, **changes), data)
    a.links.send(b.id, blocks, bytes(2048))
    await asyncio.sleep(0.02)
    assert [bool(message.error) for message in told] == [True, True]
    await until_empty(mesh)


# In any order


async def test_nothing_leaks_whatever_happens(mesh: StageMesh) -> None:
    for seed in range(25):
        await _shake(mesh, seed)
        for peer in mesh.peers.values():
            peer.heard.clear()
            peer.links.sent.clear()


async def _shake(mesh: StageMesh, seed: int) -> None:
    """Opens, losses, copies and late messages at random; then the leases end, and everything must be free."""
    dice = random.Random(seed)
    peers = [mesh.peers.get(type(SESSION)(name * 52)) or mesh.start(name, blocks=10) for name in "abcd"]  # type: ignore[call-overload]
    session = driver(mesh, peers[0], max_tokens=40)
    session.chunk = dice.choice((5, 40))
    session._hear = lambda sender, message: None  # type: ignore[method-assign]
    for _ in range(dice.randint(4, 14)):
        action = dice.choice(["open", "open", "go on", "cut", "mirror", "mirror", "renew", "close", "wait", "late", "repair"])
        cuts = dice.choice([("0-4",), ("0-2", "2-4"), ("0-1", "1-3", "3-4")])
        stages = [(dice.choice(peers), layers) for layers in cuts]
        try:
            if action == "open":
                await session.open(*stages, resume=dice.random() < 0.7)
                if dice.random() < 0.3:
                    session.send_prompt()
            elif action == "go on":
                session.tokens = session.tokens[: dice.randint(0, 40)]
                await session.go_on(*stages)
            elif action == "mirror" and session.plan:
                session.mirror(dice.randrange(len(session.plan.stages)), dice.choice([*peers, None]), eager=dice.random() < 0.5)
            elif action == "renew":
                session.renew(*dice.sample(peers, 2))
            elif action == "cut":
                mesh.cut(*dice.sample(peers, 2))
            elif action == "close":
                closing = Close(session=SESSION, epoch=dice.randint(0, session.epoch), reason="a test")
                peers[0].links.send(dice.choice(peers).id, closing)
            elif action == "late" and session.plan:
                stage = dice.randrange(len(session.plan.stages))
                session.send(stage, Resume, stage=stage, start=dice.randint(0, 50), send_from=dice.randint(0, 50))
                session.send(0, Prompt, bytes(4), step=dice.randint(0, 50), tokens=1, last=False)
            elif action == "repair":
                mesh.down.clear()
        except Exception as error:
            if not isinstance(error, RemoteFailure) and type(error).__name__ not in ("PeerLost", "TimeoutError"):
                raise
        await asyncio.sleep(dice.choice((0, 0, 0.003, 0.02)))
    session.at.listeners.clear()
    mesh.down.clear()
    await asyncio.sleep(0.03)  # what is on the way may still take a lease
    mesh.clock.ahead += 61
    await until_empty(mesh)
