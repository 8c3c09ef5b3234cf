"""Tests of the simulator: it must find each fault that a test plants into meshd."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from meshd.agents.links.backlog import Backlog
from meshd.agents.links.restoring.history import LinkHistory
from meshd.agents.machine import Transition
from meshd.agents.session import events, session
from meshd.agents.session.admission import Admission
from meshd.agents.session.answer import Answer
from meshd.agents.session.coordinator import Coordinator
from meshd.agents.session.stages.client import StageClient
from meshd.agents.stage.flow import session as stage_session
from meshd.agents.stage.flow.edges import InputEdge
from meshd.agents.stage.flow.events import StageStep
from meshd.agents.stage.kv import KvLease, KvManager
from meshd.agents.trust.trust import Trust
from meshd.errors import MeshdError
from meshd.kernels.kv.lease import HostLease
from meshd.kernels.sampling.sampler import Sampler
from meshd.protocol.messages import Lane, Message, Steps
from meshd.protocol.trust import RotationChain, Standing
from meshd.types import PeerId
from sim.network.links import SimLinks
from sim.options import Options
from sim.simulation import simulate

USUAL = Options(faults=6)
QUIET = Options(faults=0, requests=10, within_s=5.0)
LONG_STEPS = Options(faults=0, requests=10, within_s=5.0, slowness=10.0)
SHORT_STEPS = Options(faults=0, requests=8, within_s=4.0, repeats=0.3, slowness=0.05, guesses=0.0)
KV_FOR_ONE = Options(peers=3, faults=0, requests=3, within_s=0.002, prompt=340, answer=150, contexts=1)
ORPHANS = Options(kinds=("kill coordinator",), faults=3, requests=10, within_s=3.0, sessions=1)
WIDE = Options(faults=0, requests=8, within_s=0.5, prompt=480, answer=4, slowness=0.05, width=16384)
REPEATS = Options(faults=2, repeats=0.1)
ROTATIONS = Options(faults=4, kinds=("rotate",), requests=2, within_s=4.0)
SPREAD = Options(faults=0, requests=6, within_s=10.0, prompt=300, slowness=0.05, width=4096)
"""Options for long prompts that seldom share a pass with decode steps, so that their chunks are whole."""
FLAPS = Options(faults=15, kinds=("flap",), requests=8)
EXCLUSIONS = Options(faults=3, kinds=("exclude",), requests=2, within_s=4.0)


def seeds(first: int = 0) -> list[int]:
    """Return the seeds that are tried until one finds the fault. `first` did so once: trying it first saves time."""
    return [first, *(seed for seed in range(25) if seed != first)]


def finds(failure: str, options: Options, first: int = 0) -> bool:
    """Return whether a run fails with a message that contains `failure`. `first`: see `seeds`."""
    return any(failure in simulate(seed, options).failure for seed in seeds(first))


def set_action(
    monkeypatch: pytest.MonkeyPatch, table: dict[Any, Transition], row: tuple[Any, Any], action: Callable[..., Any]
) -> None:
    """Replace the action of one row of a state machine's table."""
    monkeypatch.setitem(table, row, replace(table[row], action=action))


def test_it_finds_kv_that_is_written_to_the_wrong_position(monkeypatch: pytest.MonkeyPatch) -> None:
    right = HostLease.write

    def wrong(lease: HostLease, layer: int, start: int, k: Any, v: Any) -> None:
        right(lease, layer, start + (layer == 4 and start % 16 == 9 and start + len(k) < lease.capacity), k, v)

    monkeypatch.setattr(HostLease, "write", wrong)
    assert finds("not the reference's", QUIET)


def test_it_finds_a_cache_that_claims_a_position_it_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    right = KvManager.adopt

    def wrong(caches: KvManager, *given: Any) -> Any:
        cache = right(caches, *given)
        if cache is not None and cache.filled < cache.lease.kv.capacity - 1:
            cache.filled += 1
        return cache

    monkeypatch.setattr(KvManager, "adopt", wrong)
    assert finds("not the reference's", USUAL, first=4)


def test_it_finds_a_token_that_is_emitted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(machine: session.Session, event: events.TokenArrived) -> list[events.Command]:
        machine.tokens.append(event.token)
        return [events.EmitToken(event.index, event.token, event.logprobs, event.finish)] + (
            machine._end(session.SessionState.FINISHED, event.finish) if event.finish else []
        )

    set_action(monkeypatch, session.TRANSITIONS, (session.SessionState.DECODING, events.TokenArrived), wrong)
    assert finds("reference", REPEATS)


@pytest.mark.parametrize(("states", "first"), [(("IDLE",), 7), (("IDLE", "WAITING", "READY", "COMPUTING"), 0)], ids=["idle", "any"])
def test_it_finds_a_step_that_is_computed_twice(monkeypatch: pytest.MonkeyPatch, states: tuple[str, ...], first: int) -> None:
    """Steps must be so short that a repeat arrives after the step was computed."""
    right = stage_session._step_arrived

    def wrong(machine: stage_session.StageSession, event: stage_session.StepArrived) -> list[stage_session.Command]:
        step = event.step
        if step.seq < machine.input.next_seq:
            machine.input.next_seq, machine.due, machine.committed = step.seq, step.start, step.start
        return right(machine, event)

    for state in states:
        set_action(monkeypatch, stage_session.TRANSITIONS, (stage_session.StageState[state], stage_session.StepArrived), wrong)
    assert finds("can't be taken back", SHORT_STEPS, first)


def test_it_finds_a_sampler_that_ignores_earlier_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshd.agents.stage.opening.Sampler", lambda params, *known: Sampler(params))
    assert finds("not the reference's", USUAL)


def test_it_finds_leases_that_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostLease, "forget", lambda lease: None)
    assert finds("are open", QUIET)


def test_it_finds_leases_that_are_freed_while_a_step_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(lease: KvLease) -> None:
        lease.kv.users -= 1  # type: ignore[misc]
        lease.kv.forget()
        assert lease.resident is not None
        lease.resident.sessions -= not lease.kv.users

    monkeypatch.setattr(KvLease, "release", wrong)
    assert finds("are in use", USUAL)


def test_it_finds_lanes_that_are_chosen_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short prefill step then overtakes a long one. Without numbers, the next stage blames the peer that sent both."""

    def by_size(message: Message) -> Lane:
        if isinstance(message, Steps):
            return Lane.BULK if sum(step.tokens for step in message.steps) * 576 * 4 > 64 * 1024 else Lane.CONTROL
        return message.send_lane

    def as_they_come(edge: InputEdge) -> StageStep | None:
        if not edge.early:
            return None
        edge.next_seq += 1
        return edge.early.pop(next(iter(edge.early)))

    monkeypatch.setattr(InputEdge, "take", as_they_come)
    monkeypatch.setattr("sim.network.delivery.lane_of", by_size)
    assert finds("is blamed", SPREAD)


def test_it_finds_a_peer_that_is_blamed_for_the_long_step_of_another_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshd.agents.session.stages.stall._limit_of", lambda running: 3.0)
    assert finds("is blamed", LONG_STEPS, first=7)


def test_it_finds_sessions_that_hold_memory_while_they_wait_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What opened of a plan that opened in part is kept, so the session waits for itself, or for another one that does the same."""
    monkeypatch.setattr(session.Session, "_undo_opening", lambda machine: [])
    assert finds("hold memory of a session that waits for its first plan", KV_FOR_ONE, first=1)


def test_it_finds_sessions_of_lost_coordinators_that_wait_behind_new_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Coordinator._revive

    async def wrong(coordinator: Coordinator, answer: Answer, *, at_once: bool = False) -> Answer:
        return await right(coordinator, answer)

    monkeypatch.setattr(Coordinator, "_revive", wrong)
    assert finds("to be taken over", ORPHANS, first=21)


def test_it_finds_a_peer_that_is_blamed_for_a_full_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(backlog: Backlog, peer: PeerId, item: Any) -> bool:
        try:
            backlog.links.send(peer, item.message, item.payload)
        except MeshdError as error:
            item.failed(error)
        return True

    monkeypatch.setattr(Backlog, "_try", wrong)
    assert finds("is blamed", WIDE, first=7)


def test_it_finds_an_admission_ticket_that_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[[Admission, float], None] = Admission.leave
    monkeypatch.setattr(Admission, "leave", lambda admission, lasted: right(admission, lasted) if lasted > 0.5 else None)
    assert finds("tickets", QUIET)


def test_it_finds_messages_that_are_lost_with_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LinkHistory.restart_at

    def wrong(history: LinkHistory, received: Sequence[int]) -> None:
        right(history, received)
        for sent in history.sent:
            while sent.next is not None:
                sent.wrote()

    monkeypatch.setattr(LinkHistory, "restart_at", wrong)
    assert finds("is blamed", FLAPS)


def test_it_finds_an_answer_that_stalls_because_credit_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StageClient, "grant", lambda *_: None)
    assert finds("stalls, though no peer of it has a fault", QUIET)


def test_it_finds_an_answer_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    right = session.TRANSITIONS[session.SessionState.DECODING, events.TokenArrived].action

    def wrong(machine: session.Session, event: events.TokenArrived) -> list[events.Command]:
        return right(machine, event) if event.finish is None else []

    set_action(monkeypatch, session.TRANSITIONS, (session.SessionState.DECODING, events.TokenArrived), wrong)
    monkeypatch.setattr("meshd.agents.session.stages.stall.StallWatch.check", lambda watch, answer, now: answer.renew(now))
    assert finds("not ended", QUIET, first=1)


def test_it_finds_an_epoch_that_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    right = session.TRANSITIONS[session.SessionState.RECOVERING, events.Planned].action

    def wrong(machine: session.Session, event: events.Planned) -> list[events.Command]:
        machine.epoch = 0
        return right(machine, event)

    set_action(monkeypatch, session.TRANSITIONS, (session.SessionState.RECOVERING, events.Planned), wrong)
    assert finds("back to", USUAL)


def test_it_finds_a_link_of_an_excluded_peer_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(links: SimLinks, identity: Any, stays: Any, reason: str) -> None:
        links.authority = identity.issuer.public

    monkeypatch.setattr(SimLinks, "change_key", wrong)
    assert finds("which was excluded", EXCLUSIONS)


def test_it_finds_peers_that_choose_different_ones_of_two_rotations(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RotationChain.standing_of

    def wrong(chain: RotationChain, other: RotationChain) -> Standing:
        return Standing.SAME if chain.generation == other.generation else right(chain, other)

    monkeypatch.setattr(RotationChain, "standing_of", wrong)
    assert finds("rotations count", ROTATIONS, first=5)


def test_it_finds_an_excluded_peer_that_is_not_told_that_it_belongs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Trust.hear

    async def wrong(trust: Trust, *told: Any, **known: Any) -> Any:
        return None if trust.exclusion is not None else await right(trust, *told, **known)

    monkeypatch.setattr(Trust, "hear", wrong)
    assert finds("rotations count", EXCLUSIONS)
