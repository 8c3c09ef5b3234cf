import pytest

from fake_api.answer_parts import HEAD, plain, token
from meshd.agents.service import TextDelta
from meshd.api.openai.completions.renderer import CompletionRenderer


def test_each_prompt_is_echoed_once_for_each_of_its_answers() -> None:
    renderer = CompletionRenderer(**HEAD, logprobs=None, include_usage=False, answers=4, per_prompt=2, echoes=("a", ""))
    assert [plain(event.body)["choices"][0] | {"logprobs": 0} for event in renderer.writer("cmpl-1").begin()] == [
        {"index": index, "text": "a", "logprobs": 0, "finish_reason": None} for index in (0, 1)
    ]


def test_offsets_count_characters_over_all_deltas_of_an_answer() -> None:
    writer = CompletionRenderer(**HEAD, logprobs=1, include_usage=False, answers=2, echoes=("", "")).writer("cmpl-1")
    offsets = []
    for index, text in ((0, "gro"), (1, "x"), (0, "ße"), (0, "!")):
        [event] = writer.take(index, TextDelta(text=text, tokens=(token(text),)))
        offsets.append(plain(event.body)["choices"][0]["logprobs"]["text_offset"])
    assert offsets == [[0], [0], [3], [5]]


@pytest.mark.parametrize(("count", "top"), [(None, None), (0, None), (1, [{"a": -0.5}])])
def test_the_most_likely_tokens_are_listed_if_one_or_more_are_requested(count: int | None, top: object) -> None:
    [event] = (
        CompletionRenderer(**HEAD, logprobs=count, include_usage=False, echoes=("",))
        .writer("cmpl-1")
        .take(0, TextDelta(text="a", tokens=(token("a"),)))
    )
    logprobs = plain(event.body)["choices"][0]["logprobs"]
    assert (logprobs and logprobs["top_logprobs"]) == top
    assert (logprobs is None) == (count is None)
