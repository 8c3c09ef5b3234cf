"""Run the simulator: a whole cluster in one process, under a virtual clock and a seeded network.

    python -P tests/sim/run.py --seeds 1000..2000 [--peers 5] [--faults 20] [--kinds kill,freeze]
    python -P tests/sim/run.py --seed 1234 [the same options]      one run, with its whole trace
    python -P tests/sim/run.py --events 1000000 --peers 50 --churn
                                                                   one long run, and its figures

Prints each failing seed with the command that repeats it. Exit status: 0 if every invariant held.
"""

import argparse
import dataclasses
import gc
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

from sim.faults import kinds
from sim.options import Options, replay
from sim.outcome import Outcome
from sim.simulation import simulate

_COUNTED = (
    "events",
    "callbacks",
    "messages",
    "steps",
    "checks",
    "faults",
    "exact",
    "mixed",
    "cancelled",
    "client_errors",
    "plans",
    "recoveries",
    "searches",
    "searching_s",
    "virtual_s",
    "real_s",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="run this one and print its trace")
    parser.add_argument("--seeds", type=_range, help="FIRST..LAST, without LAST; default: 0..100")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, with --seeds")
    for field in dataclasses.fields(Options):
        name = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            parser.add_argument(name, action="store_true", default=None)
        elif field.name != "kinds":
            parser.add_argument(name, type=type(field.default), help=f"default: {field.default}")
    parser.add_argument("--kinds", help=f"only these faults, separated by commas: {', '.join(kinds())}")
    given = parser.parse_args()
    named = {field.name: getattr(given, field.name) for field in dataclasses.fields(Options)}
    chosen = {name: value for name, value in named.items() if value is not None}
    if given.kinds:
        chosen["kinds"] = tuple(given.kinds.split(","))
    options = Options(**chosen)
    if options.events:
        return _long(given.seed or 0, options)
    if given.seed is not None:
        return _one(given.seed, options)
    return _many(given.seeds or range(100), options, given.jobs)


def _range(text: str) -> range:
    first, dots, last = text.partition("..")
    return range(int(first), int(last)) if dots else range(int(first), int(first) + 1)


def _one(seed: int, options: Options) -> int:
    outcome = simulate(seed, options, keep=1, echo=True)
    print(_summary([outcome]))
    print(f"{outcome}, digest {outcome.digest:08x}")
    return bool(outcome.failure)


def _many(seeds: range, options: Options, jobs: int) -> int:
    began = time.perf_counter()
    outcomes: list[Outcome] = []
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(seeds)), _use_less_gc) as pool:
        for outcome in pool.imap(partial(_run, options=options), seeds):
            outcomes.append(outcome)
            if outcome.failure:
                print(f"{outcome}\n    {replay(outcome.seed, options)}", flush=True)
    failed = [outcome for outcome in outcomes if outcome.failure]
    print(_summary(outcomes))
    longest = sorted(outcomes, key=lambda outcome: -outcome.worst[0])[:5]
    print("longest pauses: " + "; ".join(f"seed {one.seed} {one.worst[0]:.1f} s ({one.worst[1]})" for one in longest))
    print(f"{len(outcomes)} seeds in {time.perf_counter() - began:.1f} s, {len(failed)} failed")
    return bool(failed)


def _use_less_gc() -> None:
    """Let the garbage collector look only at what a run makes, and less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _run(seed: int, options: Options) -> Outcome:
    return simulate(seed, options)


def _long(seed: int, options: Options) -> int:
    outcome = simulate(seed, options)
    print(_summary([outcome]))
    print(outcome)
    return bool(outcome.failure)


def _summary(outcomes: Iterable[Outcome]) -> str:
    total: dict[str, float] = {}
    pauses: list[float] = []
    methods, kinds = Counter[str](), Counter[str]()
    for outcome in outcomes:
        for name in _COUNTED:
            total[name] = total.get(name, 0) + getattr(outcome, name)
        pauses += outcome.pauses
        methods += outcome.methods
        kinds += outcome.kinds
    pauses.sort()
    real_s = total["real_s"]
    changes = ", ".join(f"{name} {count}" for name, count in methods.most_common())
    decisions = total["plans"] + total["recoveries"]
    rows = [
        f"events {total['events']:.0f} ({total['events'] / real_s:.0f}/s), callbacks {total['callbacks']:.0f}, "
        f"messages {total['messages']:.0f}, steps {total['steps']:.0f}",
        f"decisions {decisions:.0f} ({decisions / real_s:.1f}/s): plans {total['plans']:.0f}, recoveries {total['recoveries']:.0f}",
        f"searches for a plan {total['searches']:.0f}, {1e3 * total['searching_s'] / max(1, total['searches']):.2f} ms each "
        f"({total['searches'] / max(1e-9, total['searching_s']):.0f}/s)",
        f"changes of plan after which a token came: {changes or 'none'}",
        f"computed and guessed: {', '.join(f'{name} {count}' for name, count in kinds.most_common())}",
        f"invariants checked {total['checks']:.0f} times, faults {total['faults']:.0f}",
        f"virtual time {total['virtual_s']:.0f} s, real time {real_s:.1f} s",
        f"answers exact {total['exact']:.0f}, of mixed numerics {total['mixed']:.0f}, cancelled {total['cancelled']:.0f}; "
        f"errors and broken connections that clients saw {total['client_errors']:.0f}",
    ]
    if pauses:
        shares = ", ".join(f"p{100 * share:g} {_at(pauses, share) * 1e3:.0f} ms" for share in (0.5, 0.9, 0.99, 1.0))
        rows.append(f"between two tokens (virtual): {shares}")
    return "\n".join(rows)


def _at(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


if __name__ == "__main__":
    sys.exit(main())
