"""Whole simulated clusters under seeded faults, and the simulator's own behaviour: same seed, same run."""

import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from sim.faults import kinds
from sim.options import Options, replay
from sim.outcome import Outcome
from sim.peer.compute import STEP_COUNTS
from sim.simulation import simulate

ROOT = Path(__file__).parents[2]
EACH = 6
"""Number of seeds that one test runs."""

USUAL = Options(faults=8)
CROWDED = Options(peers=5, faults=20, requests=12, within_s=25.0)
QUIET = Options(faults=0, requests=10, within_s=5.0)
TIGHT = Options(peers=3, faults=4, requests=8, within_s=8.0, prompt=300, answer=200)
"""Options for many long answers at once, so that memory for KV is scarce."""
LONG_STEPS = Options(faults=0, requests=10, within_s=5.0, slowness=10.0)
"""Options for prefill steps of many seconds, so that the steps of other sessions wait behind them."""
KV_FOR_ONE = Options(peers=3, faults=0, requests=3, within_s=0.002, prompt=340, answer=150, contexts=1)
"""Options for requests that reach several coordinators at once, with KV for one of them."""
REPEATS = Options(faults=2, repeats=0.1)
ORPHANS = Options(kinds=("kill coordinator",), faults=3, requests=10, within_s=3.0, sessions=1)
"""Options for sessions of lost coordinators that are taken over by peers that already run as many as they may."""
WIDE = Options(faults=0, requests=8, within_s=0.5, prompt=480, answer=4, slowness=0.05, width=16384)
"""Options for payloads that fill the lanes."""
SEVERAL_NUMERICS = Options(peers=5, faults=8, numerics=2)
FLAPS = Options(faults=15, kinds=("flap",), requests=8)
HARSH = Options(faults=4, kinds=("harsh network", "flap", "kill"))


def run(seed: int, options: Options) -> Outcome:
    outcome = simulate(seed, options)
    assert not outcome.failure, f"{outcome}\n    {replay(seed, options)}"
    return outcome


def test_usual_faults_cause_recoveries_and_answers_stay_exact() -> None:
    outcomes = [run(seed, USUAL) for seed in range(EACH)]
    assert sum(outcome.recoveries for outcome in outcomes) > EACH
    assert sum(outcome.exact for outcome in outcomes) > 4 * EACH
    assert {"prefill", "replay"} <= set().union(*(outcome.methods for outcome in outcomes))


@pytest.mark.parametrize(
    "options",
    [QUIET, TIGHT, REPEATS, HARSH, CROWDED, ORPHANS, WIDE],
    ids=["quiet", "tight", "repeats", "harsh", "crowded", "orphans", "wide"],
)
def test_invariants_hold_under_other_conditions(options: Options) -> None:
    for seed in range(2):
        run(seed, options)


def test_steps_of_all_kinds_and_guesses_of_all_skills_occur() -> None:
    kinds = sum((run(seed, QUIET).kinds for seed in range(3)), Counter[str]())
    skills = ("right", "wrong", "partly right")
    wanted = {*STEP_COUNTS, *skills, *(f"{skill} ahead" for skill in skills)}
    assert {name for name, count in kinds.items() if count} == wanted, kinds


@pytest.mark.parametrize("seed", [1, 3, 4])
def test_a_peer_is_not_blamed_for_a_step_that_waits_behind_a_long_one(seed: int) -> None:
    assert run(seed, LONG_STEPS).exact


def test_with_several_numerics_an_answer_is_that_of_one_or_its_story_names_the_mixture() -> None:
    outcomes = [run(seed, SEVERAL_NUMERICS) for seed in range(10)]
    assert sum(outcome.exact for outcome in outcomes) > 20
    assert sum(outcome.mixed for outcome in outcomes) > 5


def test_coordinators_that_want_the_same_kv_all_get_their_turn() -> None:
    for seed in range(8):
        outcome = run(seed, KV_FOR_ONE)
        assert not outcome.refused, f"seed {seed}"
        # The first request waits up to 5 s for the weights to be loaded. The last one of three waits for two others in turn, each
        # with up to 1.5 s of prefill and 2.5 s of decoding, and tries again up to 1.5 s after the second one has ended.
        assert outcome.worst[0] < 15, f"seed {seed}: {outcome.worst}"


def test_links_that_break_and_come_back_cost_no_epoch() -> None:
    outcomes = [run(seed, FLAPS) for seed in range(EACH)]
    assert sum(outcome.faults for outcome in outcomes) > 10 * EACH
    assert sum(outcome.exact for outcome in outcomes) > 4 * EACH
    assert [outcome.losses for outcome in outcomes] == [0] * EACH


@pytest.mark.parametrize("kind", kinds())
def test_invariants_hold_under_each_kind_of_fault(kind: str) -> None:
    assert run(2, Options(faults=4, kinds=(kind,), requests=4, within_s=6.0)).faults


def test_a_session_that_a_coordinator_gave_up_is_free_at_once() -> None:
    run(904, Options(faults=3, requests=3, within_s=6.0, answer=60))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("options", [USUAL, CROWDED, TIGHT, REPEATS, HARSH, SEVERAL_NUMERICS])
def test_invariants_hold_for_many_seeds(options: Options) -> None:
    for seed in range(1000, 1400):
        run(seed, options)


def test_the_same_seed_gives_the_same_run_also_with_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    plain, traced, other = simulate(7, USUAL), simulate(7, USUAL, keep=100, echo=True), simulate(8, USUAL)
    assert (plain.digest, plain.callbacks, plain.virtual_s) == (traced.digest, traced.callbacks, traced.virtual_s)
    assert plain.digest != other.digest
    assert capsys.readouterr().out.count("\n") > 1000
    assert len(traced.lines) == 100


def test_the_replay_command_repeats_the_run() -> None:
    """The run is repeated in another process, in which sets of strings have another order."""
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    options = Options(faults=8, kinds=("kill", "freeze", "harsh network"), repeats=0.01)
    here = simulate(5, options)
    command = shlex.split(replay(5, options))
    assert command[0] == "python"
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == bool(here.failure), done.stderr
    assert f"digest {here.digest:08x}" in done.stdout


def test_a_long_run_prints_its_figures() -> None:
    command = [sys.executable, "-P", "tests/sim/run.py", "--events", "8000", "--peers", "6", "--churn", "--models", "2"]
    done = subprocess.run([*command, "--within-s", "5"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    [events] = re.findall(r"events (\d+) \(\d+/s\)", done.stdout)
    assert int(events) >= 8000
    assert re.search(r"decisions \d+ \([\d.]+/s\): plans [1-9]\d*, recoveries [1-9]\d*", done.stdout)
    assert re.search(r"invariants checked [1-9]\d* times", done.stdout)
