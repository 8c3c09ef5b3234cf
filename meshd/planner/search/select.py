"""Choose the search for a problem by its number of peers."""

from meshd.planner.search.exact import Search, exact_search
from meshd.planner.search.heuristic import HeuristicSearch

EXACT_PEERS = 10
"""Most peers of an exact search. For 10 peers and 30 layers, `bench_planner.py` measured 1 to 91 ms for the objective LATENCY."""


def search_for(peers: int) -> Search:
    """Return the exact search for up to `EXACT_PEERS` peers, else a new heuristic search."""
    return exact_search if peers <= EXACT_PEERS else HeuristicSearch()
