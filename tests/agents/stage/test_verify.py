"""Guesses, refills and batches on real stages: the answer is to the token that of an undisturbed session."""

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from meshd.agents.stage.batch.compute import StepOutput
from meshd.agents.stage.flow.events import StageStep
from meshd.agents.stage.flow.session import StageState
from meshd.agents.stage.steps import ActiveStage
from meshd.kernels.backend import F32, LoadedLayers
from meshd.kernels.kv.lease import HostLease
from meshd.protocol.messages import Failed, Message, Open, StepKind, Steps, Tokens
from meshd.types import PeerId, SessionId, TokenLogprobs
from opaque.arena import OpaqueLease
from stage_mesh.driver import Driver
from stage_mesh.mesh import StageMesh, StagePeer
from stage_mesh.sessions import ANSWER, driver, load, sent_steps, stage_of, until_empty
from tiny.llama import TinyLlama, tiny_spec

VOCAB = 320
CREDIT = ANSWER + 64
"""A coordinator allows more tokens than the answer has, as long as they are read."""
SAMPLINGS: list[dict[str, Any]] = [
    {"logprobs": 2},
    {"temperature": 0.9, "seed": 7, "repetition_penalty": 1.1, "frequency_penalty": 0.4, "presence_penalty": 0.3, "logprobs": 1},
]
CUTS = (("0-4",), ("0-2", "2-4"), ("0-1", "1-2", "2-4"))


@pytest.fixture(scope="module")
def weights() -> Iterator[LoadedLayers]:
    """A model with a head of its own: with the embedding as head, this small model gives one token again and again."""
    _answers.clear()
    loaded = load("opaque", TinyLlama(tiny_spec(), kinds={"token_embd": "Q8_0"}))
    yield loaded
    loaded.close()


class OneOfSeveral(Driver):
    """Coordinates one of several sessions from the same peer."""

    def __init__(self, number: int, *args: Any, **sampling: Any) -> None:
        super().__init__(*args, **sampling)
        self.session = SessionId(f"{number:032x}")

    def _on_message(self, sender: PeerId, message: Message) -> None:
        if not isinstance(message, Tokens) or message.session == self.session:
            super()._on_message(sender, message)


class Guesser:
    """Guesses with the answer at hand: all right, all wrong, the first two right, or any of these.

    With `ahead`, also behind steps that are not answered.
    """

    def __init__(self, peer: StagePeer, message: Open, truth: list[int], mode: str, *, ahead: bool = False, most: int = 5) -> None:
        self.peer, self.open, self.truth, self.mode, self.runs_ahead, self.most = peer, message, truth, mode, ahead, most
        self.known = message.answered
        self.dice = random.Random(len(truth))

    def after(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        self.known += len(tokens)
        return self._guesses(self.known)

    def ahead(self) -> tuple[int, ...]:
        active = self.peer.host._active.get((self.open.session, 0))
        if active is None or not self.runs_ahead:
            return ()
        return self._guesses(active.machine.due - self.open.prompt_tokens)

    def _guesses(self, index: int) -> tuple[int, ...]:
        right = [*self.truth, 5, 5, 5, 5, 5][index : index + self.most]
        wrong = [(token + 1) % VOCAB for token in right]
        mode = self.dice.choice(["right", "wrong", "partly", "none"]) if self.mode == "random" else self.mode
        return tuple({"right": right, "wrong": wrong, "partly": right[:2] + wrong[2:], "none": []}[mode])


def let_guess(peer: StagePeer, truth: list[int], mode: str, **options: Any) -> None:
    """Let the first stages of this peer guess."""
    peer.host._opener.drafter_of = lambda message: Guesser(peer, message, truth, mode, **options)


Answer = tuple[list[int], list[TokenLogprobs]]
_answers: dict[str, Answer] = {}


async def undisturbed(mesh: StageMesh, **sampling: Any) -> Answer:
    """Returns: the answer and its logprobs of a session on one peer, without guesses; computed once for each backend."""
    if repr(sampling) not in _answers:
        alone = mesh.start("z")
        session = driver(mesh, alone, **sampling)
        await session.begin((alone, "0-4"))
        await session.wait_tokens(ANSWER)
        await session.close(alone)
        assert len(set(session.tokens)) > ANSWER // 2, "an answer of equal tokens would hide every fault"
        _answers[repr(sampling)] = session.tokens, logprobs_at(alone)
    return _answers[repr(sampling)]


def logprobs_at(peer: StagePeer) -> list[TokenLogprobs]:
    return [each for message in peer.received(Tokens) for each in message.logprobs][:ANSWER]


def machines(session: Driver) -> list[Any]:
    """Return the state machines of the session's stages."""
    assert session.plan is not None
    peers = session.plan.peers
    return [session.mesh.peers[peer].host._active[session.session, stage].machine for stage, peer in enumerate(peers)]


async def at_rest(session: Driver) -> None:
    """Wait until no step of the session is on its way or computes."""
    quiet = 0
    async with asyncio.timeout(10):
        while quiet < 5:  # iterations of the loop in which messages arrive
            await asyncio.sleep(0.002)
            quiet = (
                0 if any(machine.state in (StageState.READY, StageState.COMPUTING) for machine in machines(session)) else quiet + 1
            )


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
@pytest.mark.parametrize("mode", ["right", "wrong", "partly", "random"])
async def test_guesses_change_no_token(mesh: StageMesh, mode: str, ahead: bool) -> None:
    for number, (sampling, cuts) in enumerate(zip((*SAMPLINGS, SAMPLINGS[0]), CUTS, strict=True)):
        truth, logprobs = await undisturbed(mesh, **sampling)
        peers = [mesh.start(name) for name in ("a", "bc", "def")[number]]
        first = peers[0]
        let_guess(first, truth, mode, ahead=ahead)
        session = driver(mesh, first, **sampling)
        session.credit = CREDIT
        await session.begin(*zip(peers, cuts, strict=True))
        await session.wait_tokens(ANSWER)
        assert session.tokens[:ANSWER] == truth
        assert logprobs_at(first) == logprobs
        await _check_messages(session, mode, ahead=ahead)
        await session.close(*peers)
    await until_empty(mesh)


async def _check_messages(session: Driver, mode: str, *, ahead: bool) -> None:
    """Check that the guesses took the way that the test means, and that nothing of a void step remains."""
    first = session.at
    counts = [len(message.tokens) for message in first.received(Tokens)]
    if mode == "right":
        assert len(counts) < ANSWER // 4, "five guesses a step were right"
    if mode == "wrong":
        assert set(counts) == {1}
    if mode == "partly":
        assert set(counts[1:-1]) == {3}
    assert not first.received(Failed)
    await at_rest(session)
    *_, last = machines(session)
    if last.first:
        return
    assert last.input.begun == last.input.next_seq, "void steps were dropped"
    if mode == "wrong" and ahead:
        verify = [step for step in sent_steps(first) if step.kind is StepKind.VERIFY]
        assert len(verify) > 1.5 * len(counts), "most guesses behind a wrong guess were sent, and answered with nothing"


@pytest.mark.parametrize(("credit", "most"), [(ANSWER, 5), (CREDIT, 5), (CREDIT, 1)])
@pytest.mark.parametrize("cuts", CUTS[:2], ids=["one stage", "two stages"])
async def test_an_answer_ends_with_its_last_token_though_the_guesses_go_on(
    mesh: StageMesh, cuts: tuple[str, ...], credit: int, most: int
) -> None:
    truth, _ = await undisturbed(mesh)
    peers = [mesh.start(name) for name in "ab"[: len(cuts)]]
    let_guess(peers[0], truth, "right", ahead=True, most=most)
    session = driver(mesh, peers[0])
    session.credit = credit
    await session.begin(*zip(peers, cuts, strict=True))
    await session.wait_tokens(ANSWER)
    await at_rest(session)
    assert session.tokens == truth, "nothing is sampled after the last token"
    assert [message.finish for message in peers[0].received(Tokens) if message.finish] == ["length"]
    assert not peers[0].received(Failed)


@pytest.mark.parametrize("most", [1, 5])
@pytest.mark.parametrize("cuts", CUTS[:2], ids=["one stage", "two stages"])
async def test_nothing_is_sampled_after_the_end_of_the_sequence(mesh: StageMesh, cuts: tuple[str, ...], most: int) -> None:
    truth, _ = await undisturbed(mesh, temperature=0.9, seed=7)
    end = next(index for index in range(20, ANSWER) if truth[index] not in truth[:index])
    peers = [mesh.start(name) for name in "ab"[: len(cuts)]]
    for peer in peers:
        peer.resident.card = msgspec.structs.replace(peer.resident.card, end_of_sequence=(truth[end],))
    let_guess(peers[0], truth, "right", ahead=True, most=most)
    session = driver(mesh, peers[0], temperature=0.9, seed=7)
    session.credit = CREDIT
    await session.begin(*zip(peers, cuts, strict=True))
    await session.wait_tokens(end + 1)
    for _ in range(20):  # steps behind the end arrive and are answered in these iterations, if they are
        await asyncio.sleep(0.005)
    assert session.tokens == truth[: end + 1]
    assert [message.finish for message in peers[0].received(Tokens) if message.finish] == ["stop"]
    assert not peers[0].received(Failed), "the first stage is not confused by tokens behind the end"


@pytest.mark.parametrize("mode", ["right", "wrong", "partly"])
async def test_a_mirror_of_a_stage_that_takes_guesses_back_takes_over(mesh: StageMesh, mode: str) -> None:
    truth, _ = await undisturbed(mesh, **SAMPLINGS[1])
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    let_guess(a, truth, mode, ahead=True)
    session = driver(mesh, a, **SAMPLINGS[1])
    session.credit = 30
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.mirror(1, c, eager=True)
    await session.wait_tokens(24)
    await at_rest(session)
    (copy,) = b.host._mirrors_out._all()
    await session.until(lambda: copy.machine.held == stage_of(b).cache.filled)
    known = session.known
    mesh.isolate(b)
    session.credit = CREDIT
    await session.next_epoch((a, "0-2"), (c, "2-4"))
    assert session.opened[1].mirrored
    assert known - 12 < session.opened[1].held < known, "only committed KV was copied, so the newest token is not in it"
    await session.wait_tokens(ANSWER)
    assert session.tokens[:ANSWER] == truth


@pytest.mark.parametrize("mode", ["wrong", "partly", "random"])
async def test_a_peer_is_lost_right_after_guesses_were_taken_back(mesh: StageMesh, mode: str) -> None:
    truth, _ = await undisturbed(mesh, **SAMPLINGS[1])
    for names, tokens in (("abc", 1), ("def", 8), ("ghi", 20), ("jkl", 33)):
        a, b, c = map(mesh.start, names)
        let_guess(a, truth, mode, ahead=True)
        session = driver(mesh, a, **SAMPLINGS[1])
        session.credit = CREDIT
        await session.begin((a, "0-2"), (b, "2-4"))
        await session.wait_tokens(tokens)
        mesh.isolate(b)
        known = session.known
        await session.next_epoch((a, "0-2"), (c, "2-4"))
        opened = session.opened[0]
        assert opened.held <= known
        assert opened.kept_to <= known, "outputs of guesses are not offered again"
        await session.wait_tokens(ANSWER)
        assert session.tokens[:ANSWER] == truth
        await session.close(a, c)
    mesh.clock.ahead += 61
    await until_empty(mesh)


async def test_kept_outputs_are_those_of_the_answer(mesh: StageMesh) -> None:
    logs = []
    truth, _ = await undisturbed(mesh)
    for names, mode in (("ab", "none"), ("cd", "partly")):
        a, b = map(mesh.start, names)
        let_guess(a, truth, mode, ahead=True)
        session = driver(mesh, a)
        session.credit = CREDIT
        await session.begin((a, "0-2"), (b, "2-4"))
        await session.wait_tokens(30)
        active = stage_of(a)
        mesh.isolate(b)
        log = active.cache.log
        assert log.kept_to == active.cache.filled, "outputs of guesses are not kept after the end of a stage"
        assert log.kept_from == 0, "all others are"
        logs.append(log.rows(0, 60))
    assert np.array_equal(*logs)


def kv_of(active: ActiveStage, start: int, end: int) -> list[F32]:
    """Return K and V of positions `[start, end)` in all layers of a stage."""
    lease = active.cache.lease.kv
    if isinstance(lease, OpaqueLease):
        lease = OpaqueLease.inside(lease)
    assert isinstance(lease, HostLease)
    return [part[start:end] for layer in active.cache.layers for part in lease.read(layer, end)]


def damage(active: ActiveStage, start: int, end: int) -> F32:
    """Overwrite KV of positions `[start, end)` with other values. Returns: the KV that was there."""
    before = np.stack(kv_of(active, start, end))
    for part in kv_of(active, start, end):
        part[:] = 3.5
    return before


@pytest.mark.parametrize(("start", "end"), [(0, 32), (0, 40), (7, 30)])
async def test_a_refill_mends_kv_of_the_first_stage(mesh: StageMesh, start: int, end: int) -> None:
    truth, _ = await undisturbed(mesh)
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    session.credit = 20
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.wait_tokens(20)
    await at_rest(session)
    active = stage_of(a)
    before = damage(active, start, end)
    fields = {"seq": 1, "start": start, "tokens": end - start, "committed": 0}
    session.send_step(0, session.ids(start)[: 4 * (end - start)], kind=StepKind.REFILL, **fields)
    await session.until(lambda: active.machine.input.begun == 2)
    await at_rest(session)
    assert np.array_equal(np.stack(kv_of(active, start, end)), before)
    session.grant(CREDIT)
    await session.wait_tokens(ANSWER)
    assert session.tokens == truth


class Damager:
    """Damages KV of the next stage at some tokens of the answer, and sends the refill for it before the next step."""

    def __init__(self, peer: StagePeer, next_peer: StagePeer) -> None:
        self.peer, self.next_peer = peer, next_peer
        self.known = 0

    def after(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        self.known += len(tokens)
        if self.known in (10, 30):
            active = stage_of(self.peer)
            damage(stage_of(self.next_peer), 5, 45)
            assert active.cache.log is not None
            rows = active.cache.log.rows(5, 45)
            sent = active.machine.output.add(StageStep(5, 40, StepKind.REFILL), StepOutput(rows))
            self.peer.host._runner.sender.deliver(active, sent)
        return ()

    def ahead(self) -> tuple[int, ...]:
        return ()


async def test_a_refill_mends_kv_of_a_later_stage_between_two_steps(mesh: StageMesh) -> None:
    truth, _ = await undisturbed(mesh)
    a, b = mesh.start("a"), mesh.start("b")
    a.host._opener.drafter_of = lambda message: Damager(a, b)
    session = driver(mesh, a)
    session.credit = CREDIT
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.wait_tokens(ANSWER)
    assert session.tokens == truth
    assert [step.start for step in sent_steps(a) if step.kind is StepKind.REFILL] == [5, 5]
    assert not a.received(Failed)


async def test_eight_sessions_in_batches_get_the_tokens_that_each_gets_alone(mesh: StageMesh) -> None:
    dice = np.random.default_rng(1)
    prompts = [dice.integers(0, VOCAB, int(length)).tolist() for length in (3, 40, 17, 33, 1, 25, 40, 9)]
    sampling = [SAMPLINGS[number % 2] | {"seed": number} for number in range(len(prompts))]

    def sessions(at: StagePeer) -> list[OneOfSeveral]:
        made = [OneOfSeveral(n, mesh, at, prompt, 24, **sampling[n]) for n, prompt in enumerate(prompts)]
        for session in made:
            session.credit = CREDIT
        return made

    alone = mesh.start("z", blocks=64)
    truths = []
    for session in sessions(alone):
        await session.begin((alone, "0-4"))
        await session.wait_tokens(24)
        await session.close(alone)
        truths.append(session.tokens)

    a, b = mesh.start("a", blocks=64), mesh.start("b", blocks=64)
    modes = ("right", "none", "wrong", "partly", "none", "random", "right", "none")

    def drafter(message: Open) -> Guesser:
        number = int(message.session, 16)
        return Guesser(a, message, truths[number], modes[number], ahead=number in (2, 3))

    a.host._opener.drafter_of = drafter
    together = sessions(a)
    await asyncio.gather(*(session.begin((a, "0-2"), (b, "2-4")) for session in together))
    await asyncio.gather(*(session.wait_tokens(24) for session in together))
    assert [session.tokens[:24] for session in together] == truths
    assert not a.received(Failed)
    frames = [message for _, message in a.links.sent if isinstance(message, Steps)]
    shared = [frame for frame in frames if len({step.session for step in frame.steps}) > 1]
    assert len(shared) > len(frames) // 4, "the steps of a batch travel together"
    assert max(len(frame.steps) for frame in shared) >= 4
    for session in together:
        await session.close(a, b)
    await until_empty(mesh)
