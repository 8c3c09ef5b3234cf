"""Whole clusters under seeded faults, and proof that the simulator would notice."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshd.agents.machine import Transition
from meshd.agents.session import events, session
from meshd.agents.session.admission import Admission
from meshd.agents.stage import session as stage_session
from meshd.agents.stage.kv import KvLease, KvManager
from meshd.kernels.kv import KVPool
from meshd.kernels.sampler import Sampler
from sim.faults import kinds
from sim.options import Options, replay
from sim.outcome import Outcome
from sim.world import World

ROOT = Path(__file__).parents[2]
EACH = 10
"""Seeds of one test."""

USUAL = Options(faults=6)
CROWDED = Options(peers=5, faults=20, requests=12, within_s=25.0)
QUIET = Options(faults=0, requests=10, within_s=5.0)
TIGHT = Options(peers=3, faults=4, requests=8, within_s=8.0, prompt=300, answer=200)
"""Long answers, many at once: KV is short."""
REPEATS = Options(faults=2, repeats=0.1)
HARSH = Options(faults=4, kinds=("harsh network", "reset", "kill"))


def run(seed: int, options: Options) -> Outcome:
    outcome = World(seed, options).run()
    assert not outcome.failure, f"{outcome}\n    {replay(seed, options)}"
    return outcome


@pytest.mark.parametrize("first", range(0, 80, EACH))
def test_seeds(first: int) -> None:
    for seed in range(first, first + EACH):
        run(seed, USUAL)


@pytest.mark.parametrize("options", [QUIET, TIGHT, REPEATS, HARSH, CROWDED], ids=["quiet", "tight", "repeats", "harsh", "crowded"])
def test_other_weather(options: Options) -> None:
    for seed in range(EACH // 2):
        run(seed, options)


@pytest.mark.parametrize("kind", kinds())
def test_each_kind_of_fault(kind: str) -> None:
    assert sum(run(seed, Options(faults=4, kinds=(kind,), requests=4, within_s=6.0)).faults for seed in range(2)) >= 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("options", [USUAL, CROWDED, TIGHT, REPEATS, HARSH])
def test_many_seeds(options: Options) -> None:
    for seed in range(1000, 1400):
        run(seed, options)


# The simulator itself


def test_faults_are_felt() -> None:
    outcomes = [run(seed, USUAL) for seed in range(80, 80 + EACH)]
    assert sum(outcome.recoveries for outcome in outcomes) > EACH
    assert sum(outcome.exact for outcome in outcomes) > 4 * EACH
    assert {"prefill", "replay"} <= set().union(*(outcome.methods for outcome in outcomes))


def test_the_same_seed_is_the_same_run() -> None:
    first, second, other = World(7, USUAL).run(), World(7, USUAL).run(), World(8, USUAL).run()
    assert (first.digest, first.callbacks, first.virtual_s) == (second.digest, second.callbacks, second.virtual_s)
    assert first.digest != other.digest


def test_watching_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    plain, traced = World(7, USUAL).run(), World(7, USUAL, keep=100, echo=True).run()
    assert plain.digest == traced.digest
    assert capsys.readouterr().out.count("\n") > 1000
    assert len(traced.lines) == 100


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_the_replay_command_repeats_the_run(hash_seed: str) -> None:
    """In another process, whatever order its sets are in."""
    options = Options(faults=8, kinds=("kill", "freeze", "harsh network"), repeats=0.01)
    here = World(5, options).run()
    command = shlex.split(replay(5, options))
    assert command[0] == "python"
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == bool(here.failure), done.stderr
    assert f"digest {here.digest:08x}" in done.stdout


def test_a_long_run_prints_its_figures() -> None:
    command = [sys.executable, "-P", "tests/sim/run.py", "--events", "20000", "--peers", "6", "--churn", "--models", "2"]
    done = subprocess.run([*command, "--within-s", "5"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    [events] = re.findall(r"events (\d+) \(\d+/s\)", done.stdout)
    assert int(events) >= 20000
    assert re.search(r"decisions \d+ \([\d.]+/s\): plans [1-9]\d*, recoveries [1-9]\d*", done.stdout)
    assert re.search(r"invariants checked [1-9]\d* times", done.stdout)


def finds(saying: str, options: Options, seeds: int = 25) -> bool:
    """Whether a run ends with these words."""
    return any(saying in World(seed, options).run().failure for seed in range(seeds))


def set_action(
    monkeypatch: pytest.MonkeyPatch, table: dict[Any, Transition], row: tuple[Any, Any], action: Callable[..., Any]
) -> None:
    """Plant a fault: another action in one row of a machine's table."""
    monkeypatch.setitem(table, row, replace(table[row], action=action))


def test_it_finds_kv_in_the_wrong_place(monkeypatch: pytest.MonkeyPatch) -> None:
    right = KVPool.write

    def wrong(pool: KVPool, layer: int, table: Any, start: int, k: Any, v: Any) -> None:
        right(pool, layer, table, start + (layer == 4 and start % 16 == 9 and start + len(k) < table.capacity), k, v)

    monkeypatch.setattr(KVPool, "write", wrong)
    assert finds("not the reference's", QUIET)


def test_it_finds_kv_that_counts_though_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    right = KvManager.adopt

    def wrong(kv_manager: KvManager, *given: Any) -> Any:
        cache = right(kv_manager, *given)
        if cache is not None and cache.filled < cache.lease.table.capacity - 1:
            cache.filled += 1
        return cache

    monkeypatch.setattr(KvManager, "adopt", wrong)
    assert finds("not the reference's", USUAL)


def test_it_finds_a_token_that_is_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(machine: session.Session, event: events.TokenArrived) -> list[events.Command]:
        machine.tokens.append(event.token)
        return [events.EmitToken(event.index, event.token, event.logprobs, event.finish)] + (
            machine._end(session.SessionState.FINISHED, event.finish) if event.finish else []
        )

    set_action(monkeypatch, session.TRANSITIONS, (session.SessionState.DECODING, events.TokenArrived), wrong)
    assert finds("reference", REPEATS)


@pytest.mark.parametrize(("states", "seeds"), [(("IDLE",), 100), (("IDLE", "WAITING", "COMPUTING"), 25)], ids=["idle", "any"])
def test_it_finds_a_step_that_is_computed_twice(monkeypatch: pytest.MonkeyPatch, states: tuple[str, ...], seeds: int) -> None:
    """At rest alone a repeat does harm in one run of some thirty."""
    right = stage_session._step_arrived

    def wrong(machine: stage_session.StageSession, event: stage_session.StepArrived) -> list[stage_session.Command]:
        machine.next_position = event.step.position
        return right(machine, event)

    for state in states:
        set_action(monkeypatch, stage_session.TRANSITIONS, (stage_session.StageState[state], stage_session.StepArrived), wrong)
    assert finds("reference", REPEATS, seeds)


def test_it_finds_a_sampler_that_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshd.agents.stage.opening.Sampler", lambda params, *known: Sampler(params))
    assert finds("not the reference's", USUAL)


def test_it_finds_blocks_that_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVPool, "free", lambda pool, table: 0)
    assert finds("are taken", QUIET)


def test_it_finds_blocks_that_are_freed_under_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(lease: KvLease) -> None:
        lease.users -= 1
        lease.pool.free(lease.table)
        lease.resident.sessions -= not lease.users

    monkeypatch.setattr(KvLease, "release", wrong)
    assert finds("are in use", USUAL)


def test_it_finds_a_ticket_that_is_not_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[[Admission, float], None] = Admission.leave
    monkeypatch.setattr(Admission, "leave", lambda admission, lasted: right(admission, lasted) if lasted > 0.5 else None)
    assert finds("tickets", QUIET)


def test_it_finds_an_answer_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    right = session.TRANSITIONS[session.SessionState.DECODING, events.TokenArrived].action

    def wrong(machine: session.Session, event: events.TokenArrived) -> list[events.Command]:
        return right(machine, event) if event.finish is None else []

    set_action(monkeypatch, session.TRANSITIONS, (session.SessionState.DECODING, events.TokenArrived), wrong)
    monkeypatch.setattr("meshd.agents.session.stages.stall.StallWatch.check", lambda watch, answer, now: answer.renew(now))
    assert finds("not ended", QUIET)


def test_it_finds_an_epoch_that_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    right = session.TRANSITIONS[session.SessionState.RECOVERING, events.Planned].action

    def wrong(machine: session.Session, event: events.Planned) -> list[events.Command]:
        machine.epoch = 0
        return right(machine, event)

    set_action(monkeypatch, session.TRANSITIONS, (session.SessionState.RECOVERING, events.Planned), wrong)
    assert finds("back to", USUAL)
