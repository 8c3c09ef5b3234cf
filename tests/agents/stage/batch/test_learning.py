"""A peer learns from the steps that its stages compute, and predicts them without corrections by the planner's formulas."""

import dataclasses

import pytest

from in_process.adverts import CARD
from in_process.clocks import SetClock
from meshd.agents.placement.resident import LoadState, ResidentLayers
from meshd.agents.stage.batch.learning import StepLearning
from meshd.agents.stage.flow.events import StageStep
from meshd.planner.profile import context_class, factor_of, prefill_class
from meshd.protocol.messages import StepKind
from meshd.types import LayerRange, LearnedRates, PeerId
from stage_mesh.mesh import RATES, StageMesh
from stage_mesh.sessions import driver

PEER = PeerId("a" * 52)
ALL = CARD.layers


def resident(**times: float) -> ResidentLayers:
    return ResidentLayers(CARD, ALL, kv_tokens=4096, weight_bytes=0, state=LoadState.ACTIVE, **times)


def learned_from(loaded: ResidentLayers, layers: LayerRange, step: StageStep, compute_s: float) -> LearnedRates:
    learning = StepLearning(PEER, RATES, SetClock())
    for _ in range(50):
        learning.observe(loaded, layers, [step], compute_s, compute_s + 0.001)
    return learning.learned()


def test_a_decode_step_is_compared_with_layers_attention_and_head() -> None:
    loaded = resident(layer_decode_s=0.001, attention_token_s=1e-6, head_s=0.005)
    decode = StageStep(1000, 1, StepKind.DECODE, sample=1)
    whole_s = 30 * 0.001 + 30 * 1000 * 1e-6 + 0.005
    assert factor_of(learned_from(loaded, ALL, decode, 2 * whole_s).decode, context_class(1000)) == pytest.approx(2.0, rel=0.01)
    part_s = 10 * 0.001 + 10 * 1000 * 1e-6
    assert factor_of(learned_from(loaded, LayerRange(0, 10), decode, part_s).decode, context_class(1000)) == pytest.approx(
        1.0, rel=0.01
    )


def test_a_prefill_step_is_compared_with_its_tokens_and_pairs() -> None:
    loaded = resident(layer_prefill_s=1e-4, attention_pair_s=1e-8, head_s=0.005)
    step = StageStep(1024, 128, StepKind.PREFILL, sample=0)
    whole_s = 30 * (128 * 1e-4 + 128 * (1024 + 129 / 2) * 1e-8)
    learned = learned_from(loaded, ALL, step, 1.5 * whole_s)
    assert factor_of(learned.prefill, prefill_class(1024, is_whole=False)) == pytest.approx(1.5, rel=0.01)
    assert learned.decode == ()
    assert learned.step_overhead_s is None
    last_s = whole_s + 0.005
    learned = learned_from(loaded, ALL, dataclasses.replace(step, sample=1), last_s)
    assert factor_of(learned.prefill, prefill_class(1024, is_whole=False)) == pytest.approx(1.0, rel=0.01)


def test_a_prompt_of_one_chunk_is_told_from_the_first_chunk_of_a_longer_one() -> None:
    loaded = resident(layer_prefill_s=1e-4, attention_pair_s=1e-8)
    whole_s = 30 * (128 * 1e-4 + 128 * (129 / 2) * 1e-8)
    learning = StepLearning(PEER, RATES, SetClock())
    for _ in range(50):
        learning.observe(loaded, LayerRange(0, 29), [StageStep(0, 128, StepKind.PREFILL, sample=1)], whole_s * 29 / 30, whole_s)
        learning.observe(
            loaded, LayerRange(0, 29), [StageStep(0, 128, StepKind.PREFILL, sample=0)], 2 * whole_s * 29 / 30, 2 * whole_s
        )
    learned = learning.learned()
    assert factor_of(learned.prefill, prefill_class(64, is_whole=True)) == pytest.approx(1.0, rel=0.01)
    assert factor_of(learned.prefill, prefill_class(150, is_whole=False)) == pytest.approx(2.0, rel=0.01)


def test_what_a_decode_step_takes_beside_its_computation_is_its_overhead() -> None:
    loaded = resident(layer_decode_s=0.001, attention_token_s=1e-6, head_s=0.005)
    learned = learned_from(loaded, ALL, StageStep(100, 1, StepKind.DECODE, sample=1), 0.04)
    assert learned.step_overhead_s == pytest.approx(0.001, rel=0.05)


def test_a_pass_with_several_steps_is_predicted_after_a_few_like_it() -> None:
    """Each further row takes three times what it takes in a chunk; the weights take what was measured."""
    loaded = resident(layer_decode_s=0.001, layer_prefill_s=1e-5, attention_token_s=1e-7, attention_pair_s=1e-9, head_s=0.005)
    learning = StepLearning(PEER, RATES, SetClock())

    def decodes(count: int) -> list[StageStep]:
        return [StageStep(100 + 50 * place, 1, StepKind.DECODE, sample=1) for place in range(count)]

    def truth_s(count: int) -> float:
        row_s = 3 * (30 * (1e-5 + 1e-9 * 129 / 2) + 2 * CARD.head_parameters / RATES.prefill_flops_s)
        attention_s = sum(30 * 1e-7 * step.start for step in decodes(count))
        return 30 * 0.001 + 0.005 + (count - 1) * row_s + attention_s

    before = learning.observe(loaded, ALL, decodes(8), truth_s(8), truth_s(8))
    assert abs(before / truth_s(8) - 1) > 0.2
    for _ in range(30):
        learning.observe(loaded, ALL, decodes(8), truth_s(8), truth_s(8))
    for count in (2, 4, 8, 16):
        assert learning.observe(loaded, ALL, decodes(count), truth_s(count), truth_s(count)) == pytest.approx(
            truth_s(count), rel=0.1
        )
    assert learning.learned().decode == (), "what a step takes alone is learned from passes with one step"
    assert learning.pass_s(loaded, ALL, 8, 275) == pytest.approx(truth_s(8), rel=0.1), "the mean of its positions"


def test_a_prompt_beside_decodes_leads_the_pass() -> None:
    loaded = resident(layer_decode_s=0.001, layer_prefill_s=1e-3, attention_pair_s=1e-9, attention_token_s=1e-7)
    learning = StepLearning(PEER, RATES, SetClock())
    chunk, decode = StageStep(0, 64, StepKind.PREFILL), StageStep(300, 1, StepKind.DECODE, sample=1)
    alone_s = learning.observe(loaded, LayerRange(0, 29), [chunk], 29 * 64 * 1e-3, 2.0)
    both_s = learning.observe(loaded, LayerRange(0, 29), [decode, chunk], 29 * 65 * 1e-3, 2.0)
    assert alone_s == pytest.approx(29 * 64 * 1e-3, rel=0.01)
    assert both_s == pytest.approx(29 * 65 * 1e-3, rel=0.01)


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
