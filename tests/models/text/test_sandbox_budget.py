"""The budget of one rendering, at its bounds."""

import time

import pytest

from meshd.models.text import sandbox_budget
from meshd.models.text.sandbox_budget import (
    MAX_INTEGER_BITS,
    MAX_WORK,
    STEP,
    Budget,
    TemplateLimit,
    binop_price,
    joined_size,
    replaced_size,
    spend_on_method,
)


def test_the_last_unit_can_be_spent_and_no_more() -> None:
    budget = Budget()
    budget.spend(MAX_WORK)
    with pytest.raises(TemplateLimit, match="more work"):
        budget.spend(1)


def test_a_rendering_has_a_time_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget()
    budget.spend(1)
    later = time.monotonic() + sandbox_budget.MAX_SECONDS + 1
    monkeypatch.setattr(sandbox_budget.time, "monotonic", lambda: later)
    with pytest.raises(TemplateLimit):
        budget.spend(0)


def cost_of(value: object) -> int:
    budget = Budget()
    before = budget._left
    budget.spend_on(value)
    return before - budget._left


def test_a_value_costs_what_is_inside_it_at_every_depth() -> None:
    assert cost_of("x" * 100) == 100
    assert cost_of(7) == 8
    assert cost_of(["x" * 100]) > 100
    assert cost_of([["x" * 100] * 2] * 2) > 4 * 100
    assert cost_of({"k" * 100: "x" * 100}) > 200
    shared: list[object] = ["x"]
    for _ in range(40):
        shared = [shared, shared]
    with pytest.raises(TemplateLimit):
        cost_of(shared)


def test_items_without_a_length_cost_a_step() -> None:
    budget = Budget()
    budget.spend_on_items(iter(range(10**9)))
    assert MAX_WORK - budget._left == STEP
    with pytest.raises(TemplateLimit):
        budget.spend_on_items(range(10**9))


def test_methods_pay_for_the_text_that_they_make() -> None:
    assert replaced_size("a-b-c", "-", "+++") >= len("a-b-c".replace("-", "+++"))
    assert joined_size("--", ["a", "b", "c"]) >= len("----")
    assert joined_size("--", iter("abc")) == 0
    for method, args in (("replace", ("x", "y" * 10**6)), ("join", (["a"] * 10**3,))):
        with pytest.raises(TemplateLimit):
            spend_on_method(Budget(), "x" * 10**5, method, args)
    spend_on_method(Budget(), "x" * 10**5, "upper", ())


@pytest.mark.parametrize(
    ("operator", "left", "right", "price"),
    [
        ("+", 1, 2, 1),
        ("+", "ab", "c", 3),
        ("+", [1], [2, 3], 24),
        ("*", "ab", 5, 10),
        ("*", 5, "ab", 10),
        ("*", 1.5, 2.5, 1),
        ("%", 7, 4, 1),
        ("**", 2, -1, 1),
    ],
)
def test_an_operator_costs_the_size_of_its_result(operator: str, left: object, right: object, price: int) -> None:
    assert binop_price(operator, left, right) == price


def test_numbers_grow_to_the_limit_and_no_further() -> None:
    assert binop_price("**", 2, MAX_INTEGER_BITS // 2) == 1
    for operator, left, right in (("**", 2, MAX_INTEGER_BITS), ("*", 1 << MAX_INTEGER_BITS, 2)):
        with pytest.raises(TemplateLimit, match="too large"):
            binop_price(operator, left, right)
    with pytest.raises(TemplateLimit, match="formats text"):
        binop_price("%", "%d", 3)
