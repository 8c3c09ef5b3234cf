from typing import Any

import pytest

from fake_api.generation_requests import response
from meshd.agents.service import ChatMessage
from meshd.api.openai.responses.request import LOGPROBS
from meshd.errors import InvalidRequest


def test_the_input_of_a_response_becomes_a_chat() -> None:
    parts = [{"type": "input_text", "text": "a "}, {"type": "input_text", "text": "b"}]
    answer = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
              "content": [{"type": "output_text", "text": "c", "annotations": [], "logprobs": []}]}  # fmt: skip
    one = response(instructions="d", input=[{"role": "developer", "content": parts}, answer, {"role": "user", "content": "e"}])
    assert one.prompt == tuple(
        ChatMessage(role=role, content=content)
        for role, content in (("system", "d"), ("system", "a b"), ("assistant", "c"), ("user", "e"))
    )


def test_logprobs_are_requested_by_include() -> None:
    assert response(include=[LOGPROBS]).sampling.logprobs == 0
    assert response(include=[], top_logprobs=0).sampling.logprobs is None


@pytest.mark.parametrize(
    ("fields", "param"), [({"background": True, "store": False}, "background"), ({"top_logprobs": 2}, "top_logprobs")]
)
def test_fields_that_need_another_are_refused_without_it(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        response(**fields)
    assert refused.value.param == param
