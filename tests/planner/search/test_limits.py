from meshd.planner.search.limits import SearchLimits


def test_the_number_of_peers_is_limited() -> None:
    assert not SearchLimits(least=2).allow([1])
    assert SearchLimits(least=2).allow([1, 5, 7])
    assert [SearchLimits(exactly=2).allow(range(count)) for count in (1, 2, 3)] == [False, True, False]


def test_required_peers_must_take_part_and_forbidden_ones_not_all_together() -> None:
    assert SearchLimits(require=frozenset({1, 2})).allow((2, 1, 3))
    assert not SearchLimits(require=frozenset({1, 2})).allow((1, 3))
    assert SearchLimits(forbid=frozenset({1, 2})).allow((1, 3))
    assert not SearchLimits(forbid=frozenset({1, 2})).allow((1, 2, 3))
