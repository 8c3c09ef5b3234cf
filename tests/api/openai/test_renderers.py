from typing import Any

from fake_api.answer_parts import END, HEAD
from meshd.agents.service import TextDelta
from meshd.api.openai.chat.renderer import ChatRenderer


def renderer(**fields: Any) -> ChatRenderer:
    return ChatRenderer(**HEAD, logprobs=False, include_usage=False, **fields)


def test_only_the_events_of_a_single_answer_are_numbered() -> None:
    for answers, numbers in ((1, [0, 1, 2]), (2, [None, None, None, None, None])):
        writer = renderer(answers=answers).writer("chatcmpl-1")
        events = [
            *writer.begin(),
            *writer.take(0, TextDelta(text="a")),
            *writer.take(0, END),
            *(writer.take(1, END) if answers > 1 else ()),
        ]
        assert [event.number for event in events] == numbers
