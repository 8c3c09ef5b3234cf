"""A batch on real layers: its steps give what they give alone, and one session's fault does not end the others."""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from meshd.agents.stage.batch.compute import BatchComputation, BatchStep, Outcome, StepOutput
from meshd.agents.stage.flow.events import StageStep
from meshd.agents.stage.steps import ActiveStage, StepInput
from meshd.errors import InvalidSampling, ProtocolViolation, RemoteFailure
from meshd.kernels.backend import LoadedLayers
from meshd.kernels.sampling.sampler import Sampler
from meshd.protocol.messages import StepKind, TokensFinish
from meshd.types import SamplingParams, SessionId
from stage_mesh.driver import Driver
from stage_mesh.mesh import StageMesh, StagePeer
from stage_mesh.sessions import BACKENDS, PROMPT, load
from tiny.llama import TinyLlama, tiny_spec

Array = npt.NDArray[Any]
CUTS = {"first": ("0-2", "2-4"), "middle": ("0-1", "1-3", "3-4"), "last": ("0-2", "2-4"), "whole": ("0-4",)}
PLACES = {"first": 0, "middle": 1, "last": 1, "whole": 0}
SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 5, "logprobs": 2},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.4},
    {"temperature": 1.3, "seed": 6, "top_p": 0.9, "top_k": 40},
    {"logprobs": 0},
]


@pytest.fixture(scope="module", params=BACKENDS)
def weights(request: pytest.FixtureRequest) -> Iterator[LoadedLayers]:
    """A model with a head of its own: with the embedding as head, this small model gives one token again and again."""
    source = TinyLlama(tiny_spec(), kinds={"token_embd": "Q8_0"})
    loaded = load(request.param, source)
    yield loaded
    loaded.close()


async def opened(mesh: StageMesh, at: StagePeer, place: str, number: int, **sampling: Any) -> ActiveStage:
    """Open a session of its own at this place of a plan. Nothing but the test computes it."""
    session = Driver(mesh, at, PROMPT, 24, **sampling)
    session.session = SessionId(f"{number:032x}")
    await session.open(*((at, layers) for layers in CUTS[place]))
    return at.host._active[session.session, PLACES[place]]


def step(active: ActiveStage, start: int, values: Array, *, sample: int = 0, guesses: tuple[int, ...] = ()) -> BatchStep:
    """Make a step of ids `[tokens]` or hidden states `[tokens, hidden]`."""
    kind = StepKind.VERIFY if guesses else StepKind.PREFILL if start < len(PROMPT) else StepKind.DECODE
    payload = np.ascontiguousarray(values).data.cast("B")
    data = StepInput(start, values, None, 0.0) if values.ndim == 1 else StepInput(start, None, payload, 0.0)
    made = StageStep(start, len(values), kind, sample, start + len(values), 0, guesses, data)
    return BatchStep(active, made, 0.0)


def inputs(place: str, tokens: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    if place in ("first", "whole"):
        return rng.integers(0, 320, tokens).astype(np.int32)
    return rng.standard_normal((tokens, 128)).astype(np.float32)


def compute_batch(batch: Sequence[BatchStep]) -> list[Outcome]:
    """Compute steps that have all their KV here."""
    found = BatchComputation(batch).run()
    assert isinstance(found, list)
    return found


def output(outcome: Any) -> StepOutput:
    assert isinstance(outcome, StepOutput), outcome
    return outcome


@pytest.mark.parametrize("place", list(CUTS))
async def test_a_batch_gives_what_its_steps_give_alone(mesh: StageMesh, place: str) -> None:
    peer = mesh.start("a", blocks=64)
    alone = [await opened(mesh, peer, place, number, **params) for number, params in enumerate(SAMPLING)]
    among = [await opened(mesh, peer, place, 50 + number, **params) for number, params in enumerate(SAMPLING)]
    last = place in ("last", "whole")
    position = [0] * len(SAMPLING)
    for lengths in ((40, 7, 33, 40, 1), (1, 33, 5, 4, 39), (1, 1, 1, 1, 3)):
        results = []
        for actives in (alone, among):
            steps = []
            for number, (active, tokens) in enumerate(zip(actives, lengths, strict=True)):
                start = position[number]
                sample = int(last and start + tokens >= len(PROMPT))
                steps.append(step(active, start, inputs(place, tokens, 100 * start + number), sample=sample))
            results.append([compute_batch([each])[0] for each in steps] if actives is alone else compute_batch(steps))
        for one, other in zip(*results, strict=True):
            first, second = output(one), output(other)
            assert (first.tokens, first.finish) == (second.tokens, second.finish)
            assert first.payload == second.payload if not last else first.logprobs == second.logprobs
        position = [start + tokens for start, tokens in zip(position, lengths, strict=True)]
    assert any(result.tokens for result in map(output, results[1])) == last


@pytest.mark.parametrize("place", ["middle", "last"])
async def test_hidden_states_that_are_not_finite_end_only_their_own_session(mesh: StageMesh, place: str) -> None:
    peer = mesh.start("a", blocks=64)
    alone, *others = [await opened(mesh, peer, place, number) for number in range(4)]
    values = inputs(place, len(PROMPT), 1)
    bad = values.copy()
    bad[17, 5] = np.nan
    sample = int(place == "last")
    expected = output(compute_batch([step(alone, 0, values, sample=sample)])[0])
    batch = [step(active, 0, bad if number == 1 else values, sample=sample) for number, active in enumerate(others)]
    outcomes = compute_batch(batch)
    assert isinstance(outcomes[1], ProtocolViolation)
    for outcome in (outcomes[0], outcomes[2]):
        assert output(outcome).tokens == expected.tokens
        if place == "middle":
            assert output(outcome).payload == expected.payload


async def test_sampling_parameters_that_fit_no_token_end_only_their_own_session(mesh: StageMesh) -> None:
    peer = mesh.start("a", blocks=64)
    actives = [await opened(mesh, peer, "whole", number) for number in range(3)]
    actives[1].sampler = Sampler(SamplingParams(logit_bias={320: 1.0}))
    outcomes = compute_batch([step(active, 0, np.asarray(PROMPT, np.int32), sample=1) for active in actives])
    assert isinstance(outcomes[1], InvalidSampling)
    assert output(outcomes[0]).tokens == output(outcomes[2]).tokens != ()


def answer_of(active: ActiveStage, tokens: int) -> list[int]:
    """Compute the first tokens of an answer, one at a time."""
    answer = list(output(compute_batch([step(active, 0, np.asarray(PROMPT, np.int32), sample=1)])[0]).tokens)
    while len(answer) < tokens:
        start = len(PROMPT) + len(answer) - 1
        answer += output(compute_batch([step(active, start, np.asarray(answer[-1:], np.int32), sample=1)])[0]).tokens
    return answer


@pytest.mark.parametrize(("right", "tokens"), [(5, 6), (2, 3), (0, 1)])
async def test_a_verify_step_samples_up_to_the_first_wrong_guess(mesh: StageMesh, right: int, tokens: int) -> None:
    peer = mesh.start("a", blocks=64)
    params = {"temperature": 0.8, "seed": 3, "frequency_penalty": 0.7, "logprobs": 1}
    truth = answer_of(await opened(mesh, peer, "whole", 0, **params), 7)
    active = await opened(mesh, peer, "whole", 1, **params)
    compute_batch([step(active, 0, np.asarray(PROMPT, np.int32), sample=1)])
    ids = (truth[0], *truth[1 : 1 + right], *((token + 1) % 320 for token in truth[1 + right : 6]))
    verified = output(compute_batch([step(active, 40, np.asarray(ids, np.int32), sample=6, guesses=ids)])[0])
    assert list(verified.tokens) == truth[1 : 1 + tokens]
    assert len(verified.logprobs) == tokens
    start = 40 + tokens  # the next step takes the wrong guesses back, and its sampler counts right tokens only
    following = output(compute_batch([step(active, start, np.asarray([truth[tokens]], np.int32), sample=1)])[0])
    if tokens < 6:
        assert following.tokens == (truth[tokens + 1],)


@pytest.mark.parametrize(
    ("finish", "ignore_eos", "tokens"), [("stop", False, 2), ("stop", True, 5), ("length", True, 3), (None, False, 5)]
)
async def test_an_answer_ends_in_the_middle_of_a_verify_step(
    mesh: StageMesh, finish: str | None, ignore_eos: bool, tokens: int
) -> None:
    peer = mesh.start("a", blocks=64)
    truth = answer_of(await opened(mesh, peer, "whole", 0, temperature=1.5, seed=8), 6)
    assert len(set(truth)) == 6
    if finish == "stop":
        peer.resident.card = msgspec.structs.replace(peer.resident.card, end_of_sequence=(truth[2],))
    active = await opened(mesh, peer, "whole", 1, temperature=1.5, seed=8)
    answer = 4 if finish == "length" else 24
    active.open = msgspec.structs.replace(active.open, ignore_eos=ignore_eos, max_tokens=answer)
    compute_batch([step(active, 0, np.asarray(PROMPT, np.int32), sample=1)])
    ids = tuple(truth[:5])
    verified = output(compute_batch([step(active, 40, np.asarray(ids, np.int32), sample=5, guesses=ids)])[0])
    assert list(verified.tokens) == truth[1 : 1 + tokens]
    assert verified.finish == (None if tokens == 5 else TokensFinish(finish or ""))


async def test_an_output_that_is_kept_does_not_keep_the_whole_batch_in_memory(mesh: StageMesh) -> None:
    peer = mesh.start("a", blocks=64)
    actives = [await opened(mesh, peer, "first", number) for number in range(3)]
    steps = [step(active, 0, inputs("first", 5 + number, number)) for number, active in enumerate(actives)]
    for batch in (steps, steps[:1]):
        for outcome in compute_batch(batch):
            payload = output(outcome).payload
            assert payload is not None
            whole = payload.obj
            while isinstance(whole, np.ndarray) and isinstance(whole.base, np.ndarray):
                whole = whole.base
            assert memoryview(whole).nbytes == payload.nbytes  # type: ignore[arg-type]


async def test_the_time_of_a_pass_is_shared_by_tokens(mesh: StageMesh) -> None:
    peer = mesh.start("a", blocks=64)
    actives = [await opened(mesh, peer, "first", number) for number in range(2)]
    short, long = compute_batch([step(active, 0, inputs("first", 10 + 20 * number, 1)) for number, active in enumerate(actives)])
    assert output(long).step_s == pytest.approx(3 * output(short).step_s)


async def test_stages_that_end_a_plan_share_no_batch_with_those_that_do_not(mesh: StageMesh) -> None:
    peer = mesh.start("a", blocks=64)
    goes_on = await opened(mesh, peer, "first", 1)
    ends = Driver(mesh, peer, PROMPT, 24)
    try:
        await ends.open((peer, "0-2"))  # not the model's last layer: a mistake of this session's coordinator
    except RemoteFailure:
        return
    assert peer.host._active[ends.session, 0].layers_key != goes_on.layers_key
