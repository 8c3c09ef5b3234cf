from typing import Any

import msgspec
import pytest

from meshd.agents.service import Finished, TextDelta
from meshd.api.http.errors import problem
from meshd.api.openai.responses.renderer import ResponseRenderer
from meshd.api.openai.responses.schemas import RequestEcho
from meshd.errors import PeerLost
from meshd.types import FinishReason

RENDERER = ResponseRenderer(
    created=1,
    model="m",
    system_fingerprint="fp_0",
    logprobs=False,
    asked=RequestEcho(
        instructions=None, max_output_tokens=None, metadata={}, parallel_tool_calls=True, safety_identifier=None, temperature=1.0,
        tool_choice="auto", top_logprobs=0, top_p=1.0, user=None,
    ),
)  # fmt: skip


def plain(body: object) -> dict[str, Any]:
    return msgspec.json.decode(msgspec.json.encode(body))


@pytest.mark.parametrize(("reason", "name"), [(FinishReason.STOP, "completed"), (FinishReason.LENGTH, "incomplete")])
def test_an_answer_without_text_has_the_same_events(reason: FinishReason, name: str) -> None:
    writer = RENDERER.writer("resp_1")
    events = [
        *writer.begin(),
        *writer.take(0, Finished(reason=reason, prompt_tokens=3, completion_tokens=0, ttft_s=0.1, tpot_s=0.01)),
    ]
    assert [event.name.removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.done", "content_part.done",
        "output_item.done", name,
    ]  # fmt: skip
    assert [event.number for event in events] == list(range(8))
    assert plain(events[-1].body)["response"]["usage"]["total_tokens"] == 3


def test_a_final_failure_sends_the_object_and_any_other_repeats_the_last_number() -> None:
    writer = RENDERER.writer("resp_1")
    writer.begin()
    writer.take(0, TextDelta(text="so far"))
    failure = problem(PeerLost("peer there is lost"))
    for last, number in ((-1, 0), (4, 4)):
        assert plain(writer.fail(failure, last, for_good=False).body)["sequence_number"] == number
    response = plain(writer.fail(failure, 4, for_good=True).body)["response"]
    assert (response["status"], response["error"]["type"]) == ("failed", "peer_lost")
    assert response["output"][0]["content"][0]["text"] == "so far"
