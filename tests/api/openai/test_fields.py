import pytest

from fake_api.generation_requests import chat, completion, response
from meshd.agents.service import ChatMessage, GenerationRequest, MeshOptions
from meshd.api.openai.responses.request import LOGPROBS
from meshd.errors import InvalidRequest
from meshd.types import Objective, SamplingParams


def test_defaults_are_those_of_openai() -> None:
    [one] = chat()
    assert one == GenerationRequest(
        model="m", prompt=(ChatMessage(role="user", content="hello"),), sampling=SamplingParams(temperature=1.0, seed=2**63 - 1)
    )
    [one] = completion()
    assert one.prompt == "hello"
    assert one.max_tokens == 16
    assert response() == chat()[0]


def test_all_fields_reach_the_coordinator() -> None:
    sampling = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "presence_penalty": 0.1, "frequency_penalty": 0.2,
        "repetition_penalty": 1.1, "seed": 7,
    }  # fmt: skip
    mesh = {"stages": "a:0-1", "peers": ["a"], "min_peers": 1, "objective": "memory", "context": 128}
    logprobs = {"logprobs": True, "top_logprobs": 2}
    fields = sampling | {"logit_bias": {"5": -100}, "stop": "end", "ignore_eos": True, "mesh": mesh}
    [one] = chat(**fields, **logprobs, max_completion_tokens=9)
    assert response(**fields, include=[LOGPROBS], top_logprobs=2, max_output_tokens=9) == one
    assert one.sampling == SamplingParams(**sampling, logit_bias={5: -100.0}, logprobs=2)
    assert (one.max_tokens, one.stop, one.ignore_eos) == (9, ("end",), True)
    assert one.mesh == MeshOptions(stages="a:0-1", peers=("a",), min_peers=1, objective=Objective.MEMORY, context=128)


@pytest.mark.parametrize(
    ("seed", "seeds"), [(7, [7, 8]), (2**63 - 1, [2**63 - 1, 0]), (-1, [2**63 - 1, 0]), (None, [2**63 - 1, 0])]
)
def test_each_of_n_answers_has_the_next_seed_of_63_bits(seed: int | None, seeds: list[int]) -> None:
    assert [one.sampling.seed for one in chat(n=2, seed=seed)] == seeds


def test_options_of_a_stream_need_a_stream() -> None:
    assert chat(stream=True, stream_options={"include_usage": True})
    with pytest.raises(InvalidRequest) as refused:
        chat(stream_options={})
    assert refused.value.param == "stream_options"
