"""Which steps one pass takes: decodes first, prompts within a budget, and none that waits for ever."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from meshd.agents.stage.batch.schedule import WHOLE_TOKENS, Pick, Ready, StageKey, schedule
from meshd.bounds import MAX_BATCH
from meshd.types import SessionId

LONG = 10 * WHOLE_TOKENS
BUDGET = 50


def key(number: int) -> StageKey:
    return SessionId(f"{number:032x}"), 0


def decode(number: int, *, since: float = 0.0, layers: str = "0-4", tokens: int = 1) -> Ready:
    return Ready(key(number), layers, tokens, prefill=False, divisible=False, since=since)


def chunk(number: int, tokens: int, *, since: float = 0.0, layers: str = "0-4", divisible: bool = False) -> Ready:
    return Ready(key(number), layers, tokens, prefill=True, divisible=divisible, since=since)


def picked(*ready: Ready, budget: int = BUDGET) -> list[tuple[int, int]]:
    """Returns: (number of the session, tokens) of each step chosen, if a pass with n decodes has the budget `budget // (1 + n)`."""
    return [(int(pick.key[0], 16), pick.tokens) for pick in schedule(ready, lambda _, decodes: budget // (1 + decodes))]


def test_nothing_is_chosen_of_nothing() -> None:
    assert picked() == []


def test_all_decode_and_verify_steps_go_first_in_the_order_of_their_waiting() -> None:
    ready = chunk(0, 4, since=0), decode(1, since=3), decode(2, since=1, tokens=5), decode(3, since=2)
    assert picked(*ready) == [(2, 5), (3, 1), (1, 1), (0, 4)]


def test_a_prompt_is_cut_by_the_budget_which_counts_the_decodes_in_the_pass() -> None:
    prompt = chunk(0, LONG, divisible=True)
    assert picked(prompt) == [(0, 50)]
    assert picked(prompt, decode(1)) == [(1, 1), (0, 25)]
    assert picked(replace(prompt, tokens=40)) == [(0, 40)]
    assert picked(replace(prompt, tokens=WHOLE_TOKENS), budget=5) == [(0, WHOLE_TOKENS)], "a short prompt is not cut"


def test_a_prompt_whose_turn_it_is_not_waits_while_others_decode_and_holds_up_no_other_layers() -> None:
    prompt, other = chunk(0, LONG, divisible=True), decode(2, since=2, layers="2-4")
    assert picked(prompt, decode(1, since=3), budget=0) == [(1, 1)]
    assert picked(prompt, decode(1, since=3), other, budget=0) == [(2, 1)], "its long wait does not count"
    assert picked(prompt, chunk(3, 20, divisible=True), decode(1), budget=0) == [(1, 1), (3, 20)], "a short prompt does not wait"


def test_several_prompts_are_in_one_pass_while_they_are_short() -> None:
    prompts = [chunk(number, WHOLE_TOKENS // 2, since=-number, divisible=True) for number in range(3)]
    assert picked(*prompts) == [(2, 16), (1, 16)], "the oldest are served first"
    assert picked(chunk(0, 20), chunk(1, 20, since=1), chunk(2, 12, since=2)) == [(0, 20), (2, 12)]


def test_a_chunk_that_the_first_stage_cut_is_taken_whole() -> None:
    assert picked(chunk(0, LONG)) == [(0, LONG)], "the first one is taken even if it is larger than the budget"
    assert picked(chunk(0, LONG), chunk(1, 5, since=1, divisible=True)) == [(0, LONG)]


def test_one_pass_has_equal_layers_those_of_the_step_that_waits_longest() -> None:
    first, second = decode(0, since=2, layers="0-2"), chunk(1, 4, since=1, layers="2-4")
    assert picked(first, second) == [(1, 4)]
    assert picked(first, replace(second, since=3)) == [(0, 1)]


def test_the_budget_is_asked_for_the_stage_whose_prompt_is_cut() -> None:
    ready = chunk(0, LONG, since=1, layers="0-2", divisible=True), chunk(1, LONG, layers="2-4", divisible=True)
    budgets = {key(0): 5, key(1): 60}
    assert schedule(ready, lambda stage, _: budgets[stage]) == (Pick(key(1), 60, by_budget=True),)


def test_a_pass_has_a_bounded_number_of_steps_and_room_for_the_oldest_chunk() -> None:
    decodes = [decode(number, since=number) for number in range(MAX_BATCH + 5)]
    chosen = picked(*decodes, chunk(999, 4, since=-1))
    assert len(chosen) == MAX_BATCH
    assert chosen[:8] == [(number, 1) for number in range(8)]
    assert (999, 4) in chosen, "decode steps of a whole pass must not starve prefill"


FIELDS = st.tuples(
    st.sampled_from("ab"), st.sampled_from(["decode", "prompt", "chunk"]), st.integers(1, 3 * WHOLE_TOKENS), st.integers(0, 9)
)


def made(number: int, layers: str, kind: str, tokens: int, since: float) -> Ready:
    if kind == "decode":
        return decode(number, since=since, layers=layers, tokens=min(tokens, 32))
    return chunk(number, tokens, since=since, layers=layers, divisible=kind == "prompt")


@given(st.lists(FIELDS, max_size=90), st.integers(0, 100))
def test_every_pass_is_within_its_bounds(fields: list[tuple[str, str, int, int]], budget: int) -> None:
    ready = {key(number): made(number, *each) for number, each in enumerate(fields)}
    picks = schedule(list(ready.values()), lambda _, decodes: budget if decodes else max(budget, 1))
    assert bool(picks) == bool(ready)
    assert len({pick.key for pick in picks}) == len(picks) <= MAX_BATCH
    chosen = [(ready[pick.key], pick.tokens) for pick in picks]
    assert len({step.layers for step, _ in chosen}) <= 1
    assert all(tokens == step.tokens or (step.divisible and 0 < tokens < step.tokens) for step, tokens in chosen)
    order = [step.prefill for step, _ in chosen]
    assert order == sorted(order), "decodes first"
    chunks = [tokens for step, tokens in chosen if step.prefill]
    assert sum(chunks) <= WHOLE_TOKENS or len(chunks) == 1, "only a chunk that is alone may exceed this"


@given(st.lists(FIELDS, min_size=1, max_size=90), st.integers(1, 100))
def test_no_step_starves_though_every_other_one_comes_again(fields: list[tuple[str, str, int, int]], budget: int) -> None:
    waiting = {key(number): made(number, *each) for number, each in enumerate(fields)}
    watched = set(waiting)
    for passes in range(30 * len(fields)):
        its_turn = passes % 3 == 0
        picks = schedule(list(waiting.values()), lambda _, decodes: budget if its_turn or not decodes else 0)  # noqa: B023
        for pick in picks:
            waiting[pick.key] = replace(waiting[pick.key], since=10.0 + passes)  # the session's next step is like this one
        watched.difference_update(pick.key for pick in picks)
        if not watched:
            return
    raise AssertionError(f"{len(watched)} steps never began")
