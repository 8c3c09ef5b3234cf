from fake_api.answer_parts import END, HEAD, plain, token
from meshd.agents.service import TextDelta
from meshd.api.openai.chat.renderer import ChatRenderer


def test_logprobs_are_shown_only_if_requested() -> None:
    for logprobs, shown in ((True, [("a", [97])]), (False, None)):
        renderer = ChatRenderer(**HEAD, logprobs=logprobs, include_usage=False)
        [event] = renderer.writer("chatcmpl-1").take(0, TextDelta(text="a", tokens=(token("a"),)))
        content = plain(event.body)["choices"][0]["logprobs"]
        assert (content and [(one["token"], one["bytes"]) for one in content["content"]]) == shown


def test_the_usage_comes_after_the_end_of_the_last_answer() -> None:
    writer = ChatRenderer(**HEAD, logprobs=False, include_usage=True, answers=2, per_prompt=2).writer("chatcmpl-1")
    assert [plain(event.body)["usage"] for event in writer.begin()] == [None, None]
    assert len(writer.take(1, END)) == 1
    last, usage = writer.take(0, END)
    assert plain(last.body)["choices"][0]["finish_reason"] == "stop"
    assert plain(usage.body)["choices"] == []
    assert plain(usage.body)["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
