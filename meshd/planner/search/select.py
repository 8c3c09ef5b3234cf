"""Which search answers a question of this size."""

from meshd.planner.search.chains import Search, exact_search
from meshd.planner.search.orders import HeuristicSearch

EXACT_PEERS = 10
"""Up to so many peers every order of every subset is looked at."""


def search_for(peers: int) -> Search:
    """A search for one question over so many peers."""
    return exact_search if peers <= EXACT_PEERS else HeuristicSearch()
