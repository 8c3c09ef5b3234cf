from meshd.planner.search.exact import exact_search
from meshd.planner.search.heuristic import HeuristicSearch
from meshd.planner.search.select import EXACT_PEERS, search_for


def test_the_search_is_exact_up_to_the_limit_and_a_new_heuristic_above_it() -> None:
    assert search_for(EXACT_PEERS) is exact_search
    one, other = search_for(EXACT_PEERS + 1), search_for(EXACT_PEERS + 1)
    assert isinstance(one, HeuristicSearch)
    assert one is not other
