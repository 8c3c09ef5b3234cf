"""Properties of every plan, on random clusters."""

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from in_process.clusters import random_problem
from meshd.errors import Unavailable
from meshd.planner.model.cost import pipelined_s
from meshd.planner.model.dag import draw, validate
from meshd.planner.model.memory import RESERVE
from meshd.planner.problem import PlanInput
from meshd.planner.search.solve import Solution, solve
from meshd.types import Objective


@st.composite
def problems(draw_from: st.DrawFn, least: int = 1) -> PlanInput:
    peers, layers = draw_from(st.integers(least, 5)), draw_from(st.integers(2, 8))
    problem = random_problem(random.Random(draw_from(st.integers(0, 1 << 30))), peers, layers)
    objective = draw_from(st.sampled_from(Objective))
    return msgspec.structs.replace(problem, objective=objective, resident_only=False, min_peers=1, peers=None)


def answer(problem: PlanInput) -> Solution | None:
    try:
        return solve(problem)
    except Unavailable:
        return None


@settings(max_examples=100, deadline=None)
@given(problems(least=2))
def test_another_peer_never_makes_the_best_plan_worse(problem: PlanInput) -> None:
    fewer = answer(msgspec.structs.replace(problem, profiles=problem.profiles[:-1]))
    if fewer is not None:
        more = answer(problem)
        assert more is not None
        assert more.value <= fewer.value * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_a_plan_fits_covers_the_model_and_draws_a_sound_dag(problem: PlanInput) -> None:
    solution = answer(problem)
    if solution is None:
        return
    assert all(row.use.total_bytes <= (1 - RESERVE) * row.capacity_bytes for row in solution.estimate.memory)
    assert [layer for stage in solution.stages for layer in stage.layers] == list(problem.card.layers)
    dag = draw(problem, solution.stages)
    validate(dag, problem.card.spec, problem.context)


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(1, 8))
def test_more_memory_and_less_context_never_hurt(problem: PlanInput, factor: int) -> None:
    before = answer(problem)
    if before is None:
        return
    roomy = [msgspec.structs.replace(peer, memory_free_bytes=peer.memory_free_bytes * factor) for peer in problem.profiles]
    after = answer(msgspec.structs.replace(problem, profiles=tuple(roomy)))
    assert after is not None
    assert after.value <= before.value * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_the_parts_of_an_estimate_add_up(problem: PlanInput) -> None:
    solution = answer(problem)
    if solution is None:
        return
    whole = solution.estimate
    decode = [stage.decode_s for stage in whole.stages] + [hop.decode_s for hop in (*whole.hops, whole.back)]
    assert (sum(decode), max(decode)) == pytest.approx((whole.tpot_s, whole.period_s))
    prefill = [stage.prefill_chunk_s for stage in whole.stages] + [hop.prefill_chunk_s for hop in whole.hops]
    chunks = max(1.0, problem.prompt_tokens / min(problem.prompt_tokens, 128))
    assert pipelined_s(prefill, prefill, chunks) + whole.stages[-1].head_s == pytest.approx(whole.ttft_s)
