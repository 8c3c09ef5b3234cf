"""A peer learns from the steps that its stages compute, and predicts them without corrections by the planner's formulas."""

import dataclasses

import pytest

from in_process.adverts import CARD
from in_process.clocks import SetClock
from meshd.agents.placement.resident import LoadState, ResidentLayers
from meshd.agents.stage.learning import StepLearning
from meshd.agents.stage.session import Step
from meshd.planner.profile import context_class, factor_of, prefill_class
from meshd.types import LayerRange, LearnedRates, PeerId
from stage_mesh.mesh import RATES, StageMesh
from stage_mesh.sessions import driver

PEER = PeerId("a" * 52)
ALL = CARD.layers


def resident(**times: float) -> ResidentLayers:
    return ResidentLayers(CARD, ALL, kv_tokens=4096, weight_bytes=0, state=LoadState.ACTIVE, **times)


def learned_from(loaded: ResidentLayers, layers: LayerRange, step: Step, compute_s: float) -> LearnedRates:
    learning = StepLearning(PEER, RATES, SetClock())
    for _ in range(50):
        learning.observe(loaded, layers, step, compute_s, compute_s + 0.001)
    return learning.learned()


def test_a_decode_step_is_compared_with_layers_attention_and_head() -> None:
    loaded = resident(layer_decode_s=0.001, attention_token_s=1e-6, head_s=0.005)
    decode = Step(1000, 1, sample=True, prefill=False)
    whole_s = 30 * 0.001 + 30 * 1000 * 1e-6 + 0.005
    assert factor_of(learned_from(loaded, ALL, decode, 2 * whole_s).decode, context_class(1000)) == pytest.approx(2.0, rel=0.01)
    part_s = 10 * 0.001 + 10 * 1000 * 1e-6
    assert factor_of(learned_from(loaded, LayerRange(0, 10), decode, part_s).decode, context_class(1000)) == pytest.approx(
        1.0, rel=0.01
    )


def test_a_prefill_step_is_compared_with_its_tokens_and_pairs() -> None:
    loaded = resident(layer_prefill_s=1e-4, attention_pair_s=1e-8, head_s=0.005)
    step = Step(1024, 128, sample=False, prefill=True)
    whole_s = 30 * (128 * 1e-4 + 128 * (1024 + 129 / 2) * 1e-8)
    learned = learned_from(loaded, ALL, step, 1.5 * whole_s)
    assert factor_of(learned.prefill, prefill_class(1024, is_whole=False)) == pytest.approx(1.5, rel=0.01)
    assert learned.decode == ()
    assert learned.step_overhead_s is None
    last_s = whole_s + 0.005
    learned = learned_from(loaded, ALL, dataclasses.replace(step, sample=True), last_s)
    assert factor_of(learned.prefill, prefill_class(1024, is_whole=False)) == pytest.approx(1.0, rel=0.01)


def test_a_prompt_of_one_chunk_is_told_from_the_first_chunk_of_a_longer_one() -> None:
    loaded = resident(layer_prefill_s=1e-4, attention_pair_s=1e-8)
    whole_s = 30 * (128 * 1e-4 + 128 * (129 / 2) * 1e-8)
    learning = StepLearning(PEER, RATES, SetClock())
    for _ in range(50):
        learning.observe(loaded, LayerRange(0, 29), Step(0, 128, sample=True, prefill=True), whole_s * 29 / 30, whole_s)
        learning.observe(loaded, LayerRange(0, 29), Step(0, 128, sample=False, prefill=True), 2 * whole_s * 29 / 30, 2 * whole_s)
    learned = learning.learned()
    assert factor_of(learned.prefill, prefill_class(64, is_whole=True)) == pytest.approx(1.0, rel=0.01)
    assert factor_of(learned.prefill, prefill_class(150, is_whole=False)) == pytest.approx(2.0, rel=0.01)


def test_what_a_decode_step_takes_beside_its_computation_is_its_overhead() -> None:
    loaded = resident(layer_decode_s=0.001, attention_token_s=1e-6, head_s=0.005)
    learned = learned_from(loaded, ALL, Step(100, 1, sample=True, prefill=False), 0.04)
    assert learned.step_overhead_s == pytest.approx(0.001, rel=0.05)


async def test_every_stage_of_an_answer_teaches_its_peer(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.wait_tokens(6)
    for peer in (a, b):
        learned = peer.host.learning.learned()
        assert learned.decode
        assert learned.prefill
        assert learned.step_overhead_s is not None
        assert learned.step_overhead_s > 0
