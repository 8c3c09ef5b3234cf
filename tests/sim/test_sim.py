"""Whole simulated clusters under seeded faults, and the simulator's own behaviour: same seed, same run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sim.faults import kinds
from sim.options import Options, replay
from sim.outcome import Outcome
from sim.simulation import simulate

ROOT = Path(__file__).parents[2]
EACH = 10
"""Number of seeds that one test runs."""

USUAL = Options(faults=8)
CROWDED = Options(peers=5, faults=20, requests=12, within_s=25.0)
QUIET = Options(faults=0, requests=10, within_s=5.0)
TIGHT = Options(peers=3, faults=4, requests=8, within_s=8.0, prompt=300, answer=200)
"""Options for many long answers at once, so that memory for KV is scarce."""
LONG_STEPS = Options(faults=0, requests=10, within_s=5.0, slowness=5.0)
"""Options for prefill steps of many seconds, so that the steps of other sessions wait behind them."""
KV_FOR_ONE = Options(peers=3, faults=0, requests=3, within_s=0.002, prompt=340, answer=150, contexts=1)
"""Options for requests that reach several coordinators at once, with KV for one of them."""
REPEATS = Options(faults=2, repeats=0.1)
HARSH = Options(faults=4, kinds=("harsh network", "reset", "kill"))


def run(seed: int, options: Options) -> Outcome:
    outcome = simulate(seed, options)
    assert not outcome.failure, f"{outcome}\n    {replay(seed, options)}"
    return outcome


@pytest.mark.parametrize("first", range(0, 20, EACH))
def test_usual_faults_cause_recoveries_and_answers_stay_exact(first: int) -> None:
    outcomes = [run(seed, USUAL) for seed in range(first, first + EACH)]
    assert sum(outcome.recoveries for outcome in outcomes) > EACH
    assert sum(outcome.exact for outcome in outcomes) > 4 * EACH
    assert {"prefill", "replay"} <= set().union(*(outcome.methods for outcome in outcomes))


@pytest.mark.parametrize("options", [QUIET, TIGHT, REPEATS, HARSH, CROWDED], ids=["quiet", "tight", "repeats", "harsh", "crowded"])
def test_invariants_hold_under_other_conditions(options: Options) -> None:
    for seed in range(EACH // 2):
        run(seed, options)


@pytest.mark.parametrize("seed", range(8))
def test_a_peer_is_not_blamed_for_a_step_that_waits_behind_a_long_one(seed: int) -> None:
    assert run(seed, LONG_STEPS).exact


def test_coordinators_that_want_the_same_kv_all_get_their_turn() -> None:
    for seed in range(20):
        outcome = run(seed, KV_FOR_ONE)
        assert not outcome.refused, f"seed {seed}"
        assert outcome.worst[0] < 10, f"seed {seed}: {outcome.worst}"


@pytest.mark.parametrize("kind", kinds())
def test_invariants_hold_under_each_kind_of_fault(kind: str) -> None:
    assert sum(run(seed, Options(faults=4, kinds=(kind,), requests=4, within_s=6.0)).faults for seed in range(2)) >= 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("options", [USUAL, CROWDED, TIGHT, REPEATS, HARSH])
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
    command = [sys.executable, "-P", "tests/sim/run.py", "--events", "20000", "--peers", "6", "--churn", "--models", "2"]
    done = subprocess.run([*command, "--within-s", "5"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    [events] = re.findall(r"events (\d+) \(\d+/s\)", done.stdout)
    assert int(events) >= 20000
    assert re.search(r"decisions \d+ \([\d.]+/s\): plans [1-9]\d*, recoveries [1-9]\d*", done.stdout)
    assert re.search(r"invariants checked [1-9]\d* times", done.stdout)
