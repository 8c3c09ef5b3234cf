"""What the coordinator is asked, for what a client wrote."""

from typing import Any

import msgspec
import pytest

from meshd.agents.service import ChatMessage, GenerationRequest, MeshOptions
from meshd.api.http.body import decode_body
from meshd.api.openai.chat.schemas import ChatRequest
from meshd.api.openai.completions.schemas import CompletionRequest
from meshd.api.openai.responses.request import LOGPROBS, ResponseRequest
from meshd.clock import SystemClock
from meshd.errors import InvalidRequest
from meshd.types import Objective, SamplingParams


class FixedClock(SystemClock):
    def random_bytes(self, count: int) -> bytes:
        return b"\xff" * count


def chat(**fields: Any) -> list[GenerationRequest]:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]} | fields
    return decode_body(msgspec.json.encode(body), ChatRequest).generation_requests(FixedClock())


def completion(**fields: Any) -> list[GenerationRequest]:
    body = {"model": "m", "prompt": "hello"} | fields
    return decode_body(msgspec.json.encode(body), CompletionRequest).generation_requests(FixedClock())


def response(**fields: Any) -> GenerationRequest:
    body = {"model": "m", "input": "hello"} | fields
    [one] = decode_body(msgspec.json.encode(body), ResponseRequest).generation_requests(FixedClock())
    return one


def test_defaults_are_openais() -> None:
    [one] = chat()
    assert one == GenerationRequest(
        model="m", prompt=(ChatMessage(role="user", content="hello"),), sampling=SamplingParams(temperature=1.0, seed=2**63 - 1)
    )
    [one] = completion()
    assert one.prompt == "hello"
    assert one.max_tokens == 16
    assert response() == chat()[0]


def test_a_templates_variables_are_passed_on() -> None:
    [one] = chat(chat_template_kwargs={"enable_thinking": False, "deep": [{"x": None}]})
    assert one.template == {"enable_thinking": False, "deep": [{"x": None}]}
    assert chat(chat_template_kwargs=None) == chat()
    with pytest.raises(InvalidRequest, match="chat_template_kwargs"):
        chat(chat_template_kwargs=["enable_thinking"])


def test_everything_is_passed_on() -> None:
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


def test_content_parts_are_joined_and_a_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": parts, "name": "x"}, {"role": "assistant", "content": "c", "refusal": None}]
    [one] = chat(messages=messages)
    assert one.prompt == (ChatMessage(role="system", content="a b", name="x"), ChatMessage(role="assistant", content="c"))


def test_the_input_of_a_response_is_a_chat() -> None:
    parts = [{"type": "input_text", "text": "a "}, {"type": "input_text", "text": "b"}]
    answer = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
              "content": [{"type": "output_text", "text": "c", "annotations": [], "logprobs": []}]}  # fmt: skip
    one = response(instructions="d", input=[{"role": "developer", "content": parts}, answer, {"role": "user", "content": "e"}])
    assert one.prompt == tuple(
        ChatMessage(role=role, content=content)
        for role, content in (("system", "d"), ("system", "a b"), ("assistant", "c"), ("user", "e"))
    )


def test_the_logprobs_of_a_response() -> None:
    assert response(include=[LOGPROBS]).sampling.logprobs == 0
    assert response(include=[], top_logprobs=0).sampling.logprobs is None


@pytest.mark.parametrize(
    ("seed", "seeds"), [(7, [7, 8]), (2**63 - 1, [2**63 - 1, 0]), (-1, [2**63 - 1, 0]), (None, [2**63 - 1, 0])]
)
def test_each_of_n_answers_has_the_next_seed_of_63_bits(seed: int | None, seeds: list[int]) -> None:
    assert [one.sampling.seed for one in chat(n=2, seed=seed)] == seeds


def test_chat_logprobs_without_a_number_are_of_the_chosen_token() -> None:
    assert chat(logprobs=True)[0].sampling.logprobs == 0
    assert chat(logprobs=False)[0].sampling.logprobs is None
    assert completion(logprobs=0)[0].sampling.logprobs == 0


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
def test_kinds_of_prompts(prompt: object, prompts: list[object]) -> None:
    assert [one.prompt for one in completion(prompt=prompt)] == prompts


def test_answers_are_ordered_by_prompt() -> None:
    wanted = completion(prompt=["a", "b"], n=2, seed=1, best_of=2)
    assert [(one.prompt, one.sampling.seed) for one in wanted] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
