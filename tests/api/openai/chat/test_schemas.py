import pytest

from fake_api.generation_requests import chat, completion
from meshd.agents.service import ChatMessage
from meshd.errors import InvalidRequest


def test_variables_of_the_chat_template_reach_the_coordinator() -> None:
    [one] = chat(chat_template_kwargs={"enable_thinking": False, "deep": [{"x": None}]})
    assert one.template == {"enable_thinking": False, "deep": [{"x": None}]}
    assert chat(chat_template_kwargs=None) == chat()
    with pytest.raises(InvalidRequest, match="chat_template_kwargs"):
        chat(chat_template_kwargs=["enable_thinking"])


def test_content_parts_are_joined_and_the_role_developer_becomes_system() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": parts, "name": "x"}, {"role": "assistant", "content": "c", "refusal": None}]
    [one] = chat(messages=messages)
    assert one.prompt == (ChatMessage(role="system", content="a b", name="x"), ChatMessage(role="assistant", content="c"))


def test_logprobs_without_a_number_are_those_of_the_chosen_token() -> None:
    assert chat(logprobs=True)[0].sampling.logprobs == 0
    assert chat(logprobs=False)[0].sampling.logprobs is None
    assert completion(logprobs=0)[0].sampling.logprobs == 0


def test_two_different_limits_of_tokens_are_refused() -> None:
    assert chat(max_tokens=5, max_completion_tokens=5)[0].max_tokens == 5
    with pytest.raises(InvalidRequest) as refused:
        chat(max_tokens=5, max_completion_tokens=6)
    assert refused.value.param == "max_tokens"
