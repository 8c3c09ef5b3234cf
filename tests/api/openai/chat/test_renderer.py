from fake_api.answer_parts import HEAD, plain, token
from meshd.agents.service import TextDelta
from meshd.api.openai.chat.renderer import ChatRenderer


def test_logprobs_are_shown_only_if_requested() -> None:
    for logprobs, shown in ((True, [("a", [97])]), (False, None)):
        renderer = ChatRenderer(**HEAD, logprobs=logprobs, include_usage=False)
        [event] = renderer.writer("chatcmpl-1").take(0, TextDelta(text="a", tokens=(token("a"),)))
        content = plain(event.body)["choices"][0]["logprobs"]
        assert (content and [(one["token"], one["bytes"]) for one in content["content"]]) == shown
