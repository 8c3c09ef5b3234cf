import pytest

from meshd.types import LayerRange, is_peer_id, ranges_of


def test_a_layer_range_is_half_open() -> None:
    layers = LayerRange.parse("3-6")
    assert (list(layers), len(layers), str(layers)) == ([3, 4, 5], 3, "3-6")
    assert 3 in layers
    assert 6 not in layers
    assert "3" not in layers


@pytest.mark.parametrize("text", ["", "3", "3-", "-3", "6-3", "3-3", "a-b", "-1-4"])
def test_an_invalid_layer_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  int() and parse() word it differently
        LayerRange.parse(text)


def test_ranges_that_touch_do_not_overlap() -> None:
    assert not LayerRange(0, 3).overlaps(LayerRange(3, 6))
    assert LayerRange(0, 4).overlaps(LayerRange(3, 6))
    assert LayerRange(1, 2) in LayerRange(1, 2)
    assert LayerRange(1, 4) not in LayerRange(1, 3)


def test_layers_are_combined_into_as_few_ranges_as_possible() -> None:
    assert ranges_of([7, 1, 0, 2, 5, 7]) == (LayerRange(0, 3), LayerRange(5, 6), LayerRange(7, 8))
    assert ranges_of([]) == ()


def test_a_peer_id_has_52_letters_of_base32() -> None:
    assert is_peer_id("a2" * 26)
    for text in ("a2" * 25, "A2" * 26, "a1" * 26, ""):
        assert not is_peer_id(text)
