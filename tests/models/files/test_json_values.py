"""Values of a config.json: valid ranges, and values of the wrong type."""

from typing import Any

import pytest

from meshd.errors import ModelFileError
from meshd.models.files.json_values import Config


@pytest.mark.parametrize("value", [0, -1, 1 << 31, 1.0, True, "1", [1], {}])
def test_the_error_for_an_invalid_count_names_its_key(value: Any) -> None:
    with pytest.raises(ModelFileError, match=r"layers is .*, not a positive integer"):
        Config({"layers": value}).count("layers")


@pytest.mark.parametrize("value", [0, -1e-9, 1e30, float("inf"), float("nan"), False, "1", 10**400])
def test_the_error_for_an_invalid_number_names_its_key(value: Any) -> None:
    with pytest.raises(ModelFileError, match=r"theta is .*, not a positive number"):
        Config({"theta": value}).number("theta")


def test_the_smallest_and_largest_valid_values_are_accepted() -> None:
    assert Config({"n": 1}).count("n") == 1
    assert Config({"n": (1 << 31) - 1}).count("n") == (1 << 31) - 1
    assert Config({"x": 1}).number("x") == 1.0


def test_null_and_missing_take_the_default_and_fail_without_one() -> None:
    for values in ({}, {"n": None}):
        config = Config(values)
        assert not config.given("n")
        assert (config.count("n", 7), config.number("n", 0.5), config.section("n")) == (7, 0.5, None)
        with pytest.raises(ModelFileError, match="n is None"):
            config.count("n")


def test_lists_need_their_length_and_every_item() -> None:
    assert Config({"f": [1, 2.5]}).numbers("f", 2) == (1.0, 2.5)
    for value in ([1], [1, 2, 3], 1, None, "ab"):
        with pytest.raises(ModelFileError, match="not a list of 2 numbers"):
            Config({"f": value}).numbers("f", 2)
    with pytest.raises(ModelFileError, match="f is x"):
        Config({"f": [1, "x"]}).numbers("f", 2)


def test_sections_are_objects() -> None:
    inner = Config({"rope": {"theta": 2}}).section("rope")
    assert inner is not None
    assert inner.number("theta") == 2.0
    assert Config({"rope": {}}).section("rope") is None
    with pytest.raises(ModelFileError, match="rope is not an object"):
        Config({"rope": [1]}).section("rope")


def test_a_huge_value_makes_a_short_message() -> None:
    with pytest.raises(ModelFileError) as caught:
        Config({"n": "x" * 100_000}).count("n")
    assert len(caught.value.message) < 200
