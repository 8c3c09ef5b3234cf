"""A prompt gets a bounded share of the time of sessions that decode, in few passes, and all of it where none decodes."""

import pytest

from meshd.agents.stage.batch.learning import StepLearning
from meshd.agents.stage.batch.pacing import LONGEST_WAIT_S, PREFILL_SHARE, TURN_PASSES, PromptPacing
from meshd.agents.stage.steps import ActiveStage
from meshd.clock import SystemClock
from meshd.types import PeerId
from stage_mesh.mesh import RATES, StageMesh
from stage_mesh.sessions import driver

LAYERS = 4
TWO = 1.1
"""A pass with two decode steps takes so much longer than one with a single step: a row takes a tenth of it, as a prompt's token."""


async def stage_of(mesh: StageMesh, *, pass_s: float, read_s: float = 1e-9) -> ActiveStage:
    """Open a stage. A decode step takes `pass_s`, a token of a prompt a tenth of that, and reading 1,000 positions `read_s`."""
    session = driver(mesh, a := mesh.start("a"))
    session.chunk = 150
    await session.begin((a, f"0-{LAYERS}"))
    (active,) = a.host._active.values()
    resident = active.resident
    resident.layer_decode_s, resident.layer_prefill_s, resident.head_s = pass_s / LAYERS, pass_s / LAYERS / 10, 1e-9
    resident.attention_token_s, resident.attention_pair_s = read_s / 1000 / LAYERS, 1e-15
    return active


def pacing() -> PromptPacing:
    return PromptPacing(StepLearning(PeerId("a" * 52), RATES, SystemClock()))


def chunks(active: ActiveStage, passes: int, *, start: int = 0, prompts: int = 1, decodes: int = 2) -> list[int]:
    """Compute passes with decode steps. Returns: how many tokens of the prompt each takes."""
    paced, taken = pacing(), []
    for _ in range(passes):
        taken.append(paced.budget(active, start, decodes, [0] * decodes, prompts))
        paced.chosen(active.stage, by_budget=taken[-1] > 0)
    return taken


async def test_where_none_decodes_a_prompt_takes_whole_chunks_in_every_pass(mesh: StageMesh) -> None:
    paced, active = pacing(), await stage_of(mesh, pass_s=0.03)
    for _ in range(3):
        assert paced.budget(active, 500, 0, [], 1) == active.open.plan.prefill_chunk_tokens
        paced.chosen(active.stage, by_budget=True)


async def test_beside_decode_steps_one_pass_in_a_turn_takes_a_chunk_with_the_share_of_them_all(mesh: StageMesh) -> None:
    taken = chunks(await stage_of(mesh, pass_s=0.03), 3 * TURN_PASSES)
    assert [index for index, tokens in enumerate(taken) if tokens] == [0, TURN_PASSES, 2 * TURN_PASSES]
    assert taken[0] == pytest.approx(PREFILL_SHARE * TURN_PASSES * 10 * TWO, abs=1)


async def test_a_chunk_delays_a_slow_pass_by_no_more_than_the_stated_time(mesh: StageMesh) -> None:
    pass_s = LONGEST_WAIT_S / PREFILL_SHARE / 4.5 / TWO
    taken = chunks(active := await stage_of(mesh, pass_s=pass_s), 12)
    assert [index for index, tokens in enumerate(taken) if tokens] == [0, 4, 8]
    assert 0.8 * LONGEST_WAIT_S < max(taken) * pass_s / 10 <= LONGEST_WAIT_S
    active.resident.layer_decode_s = 2 * LONGEST_WAIT_S
    assert all(chunks(active, 5)), "where a single pass takes that long, each has a chunk"


async def test_where_more_sessions_wait_with_prompts_than_decode_these_get_more(mesh: StageMesh) -> None:
    taken = chunks(await stage_of(mesh, pass_s=0.05), 9, prompts=4)
    assert [index for index, tokens in enumerate(taken) if tokens] == [0, 4, 8], "of more passes, because a chunk may take 0.5 s"
    assert taken[0] / 4 == pytest.approx(4 / 2 * 10 * TWO, rel=0.05), "four prompts get twice as much time as two decode steps"


async def test_a_chunk_computes_for_as_long_as_it_reads_the_kv_before_it_at_least(mesh: StageMesh) -> None:
    """Reading takes as long as 10 passes: more than the share of a turn."""
    active = await stage_of(mesh, pass_s=0.001, read_s=0.001)
    assert chunks(active, 1, start=10_000)[0] == pytest.approx(10 * 10, abs=1)


async def test_a_prompt_takes_little_in_each_pass_while_decode_steps_are_at_other_peers(mesh: StageMesh) -> None:
    paced, active = pacing(), await stage_of(mesh, pass_s=0.03)
    for _ in range(3):
        assert paced.budget(active, 0, 0, [0, 0], 1) == pytest.approx(PREFILL_SHARE * 10 * TWO, abs=1)
        paced.chosen(active.stage, by_budget=True)
