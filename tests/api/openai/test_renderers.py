from typing import Any

import pytest

from fake_api.answer_parts import END, HEAD
from meshd.agents.service import Finished, TextDelta
from meshd.api.openai.chat.renderer import ChatRenderer
from meshd.errors import Cancelled
from meshd.types import FinishReason


def renderer(**fields: Any) -> ChatRenderer:
    return ChatRenderer(**HEAD, logprobs=False, include_usage=False, **fields)


def test_the_events_of_one_answer_are_numbered_from_0_and_those_of_several_are_not() -> None:
    for answers, numbers in ((1, [0, 1, 2]), (2, [None, None, None, None, None])):
        writer = renderer(answers=answers).writer("chatcmpl-1")
        events = [
            *writer.begin(),
            *writer.take(0, TextDelta(text="a")),
            *writer.take(0, END),
            *(writer.take(1, END) if answers > 1 else ()),
        ]
        assert [event.number for event in events] == numbers


def test_an_empty_delta_makes_no_event() -> None:
    assert renderer().writer("chatcmpl-1").take(0, TextDelta(text="")) == []


def test_an_answer_that_was_cut_short_has_no_last_event() -> None:
    end = Finished(reason=FinishReason.CANCELLED, prompt_tokens=3, completion_tokens=2, ttft_s=0.1, tpot_s=0.01)
    with pytest.raises(Cancelled):
        renderer().writer("chatcmpl-1").take(0, end)
