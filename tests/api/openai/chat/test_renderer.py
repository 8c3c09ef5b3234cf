from typing import Any

import msgspec

from meshd.agents.service import Finished, TextDelta, TokenText
from meshd.api.openai.chat.renderer import ChatRenderer
from meshd.types import FinishReason

HEAD: dict[str, Any] = {"created": 1, "model": "m", "system_fingerprint": "fp_0"}
END = Finished(reason=FinishReason.STOP, prompt_tokens=3, completion_tokens=2, ttft_s=0.1, tpot_s=0.01)


def token(text: str) -> TokenText:
    return TokenText(token=text, token_id=1, logprob=-0.5, bytes=tuple(text.encode()))


def plain(body: object) -> dict[str, Any]:
    return msgspec.json.decode(msgspec.json.encode(body))


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
