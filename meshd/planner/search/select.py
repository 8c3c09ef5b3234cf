"""Choose the search for a question by its number of peers."""

from meshd.planner.search.chains import Search, exact_search
from meshd.planner.search.orders import HeuristicSearch

EXACT_PEERS = 10
"""Up to so many peers the search is exact."""


def search_for(peers: int) -> Search:
    """A new search for one question over so many peers."""
    return exact_search if peers <= EXACT_PEERS else HeuristicSearch()
