"""Measure how long the planner takes, and how much worse the plans of its heuristic are than the best plans.

    python tests/benchmarks/bench_planner.py [--layers 30] [--clusters 5]

The model has the shape of SmolLM2-135M, and the clusters are random. "loose": every peer can hold the model alone. "tight": only
several peers together can. Times are medians over the clusters.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

from in_process.clusters import make_card, make_peer, make_problem, random_links
from meshd.errors import DoesNotFit
from meshd.planner.eligible import eligible
from meshd.planner.model.memory import memory_table
from meshd.planner.model.tables import CostTables
from meshd.planner.problem import PlanInput
from meshd.planner.search.exact import exact_search
from meshd.planner.search.heuristic import HeuristicSearch
from meshd.planner.search.limits import SearchLimits
from meshd.planner.search.objectives import cheapest
from meshd.planner.search.solve import solve
from meshd.types import Objective

PEERS = (3, 5, 8, 10, 20, 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--clusters", type=int, default=5)
    options = parser.parse_args()
    print(f"{'milliseconds to solve':<24}" + "".join(f"{objective.value:>12}" for objective in Objective))
    for count in PEERS:
        for tight in (False, True):
            problems = [cluster(random.Random(seed), count, options.layers, tight=tight) for seed in range(options.clusters)]
            times = [statistics.median(timed(problem, objective) for problem in problems) for objective in Objective]
            print(f"{count:>4} peers, {'tight' if tight else 'loose':<12}" + "".join(f"{1e3 * seconds:12.1f}" for seconds in times))
    print(f"{'gap of the heuristic, %':<24}" + "".join(f"{objective.value:>12}" for objective in Objective))
    problems = [cluster(random.Random(seed), 10, options.layers, tight=seed % 2 == 0) for seed in range(2 * options.clusters)]
    gaps = [[gap(problem, objective) for problem in problems] for objective in Objective]
    print(f"{'  10 peers, mean':<24}" + "".join(f"{100 * statistics.mean(row):12.2f}" for row in gaps))
    print(f"{'  10 peers, worst':<24}" + "".join(f"{100 * max(row):12.2f}" for row in gaps))


def cluster(rng: random.Random, count: int, layers: int, *, tight: bool) -> PlanInput:
    """Make peers whose speeds differ by up to six times. `tight`: together they have twice the memory that the layers take."""
    card = make_card(layers)
    memory = memory_table(make_problem(make_peer("x"), card=card), make_peer("x"))
    middle, spread = float(memory[1, 2]), 2 * float(memory[0, layers] - memory[1, 2]) / count
    peers = [
        make_peer(
            f"p{place:02}",
            decode_gb_s=10 ** rng.uniform(0.5, 1.3),
            prefill_gflops=10 ** rng.uniform(1.5, 2.5),
            power_w=rng.uniform(5, 50),
            memory=int(1.15 * (middle + rng.uniform(0.5, 1.5) * spread + 20e6)) if tight else 4 << 30,
        )
        for place in range(count)
    ]
    return make_problem(*peers, card=card, network=random_links(rng, peers), prompt_tokens=1000, context=1024)


def timed(problem: PlanInput, objective: Objective) -> float:
    problem = msgspec.structs.replace(problem, objective=objective)
    began = time.perf_counter()
    try:
        solve(problem)
    except DoesNotFit as error:
        sys.exit(f"the model does not fit this cluster, but it should: {error}")
    return time.perf_counter() - began


def gap(problem: PlanInput, objective: Objective) -> float:
    """Return how much worse the heuristic's plan is than the best plan, as a share of the best plan's value."""
    tables = CostTables(problem, eligible(problem))
    exact, found = (cheapest(tables, objective, SearchLimits(), search) for search in (exact_search, HeuristicSearch()))
    if exact is None or found is None:
        sys.exit("a search found no plan, but the model should fit this cluster")
    return found.value / exact.value - 1


if __name__ == "__main__":
    main()
