import math
from collections.abc import AsyncIterator, Sequence

import pytest

from meshd.agents.service import Finished, TextDelta
from meshd.api.openai.common_objects import CollectedAnswer, Usage, UsageCounter, clamp_logprob, collect, finish_name
from meshd.errors import Cancelled
from meshd.types import FinishReason


def finished(reason: FinishReason = FinishReason.STOP, *, prompt: int = 3, completion: int = 5) -> Finished:
    return Finished(reason=reason, prompt_tokens=prompt, completion_tokens=completion, ttft_s=0.1, tpot_s=0.01)


def test_the_tokens_of_a_prompt_count_once_for_its_answers() -> None:
    counter = UsageCounter(per_prompt=2)
    for index in (1, 0, 3, 2):
        counter.add(index, finished())
    assert counter.usage() == Usage(prompt_tokens=6, completion_tokens=20, total_tokens=26)
    assert counter.ended == 4


@pytest.mark.parametrize(("reason", "name"), [(FinishReason.STOP, "stop"), (FinishReason.LENGTH, "length")])
def test_finish_reasons_have_openais_names(reason: FinishReason, name: str) -> None:
    assert finish_name(finished(reason)) == name


@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.ERROR])
def test_an_answer_whose_session_was_ended_is_an_error(reason: FinishReason) -> None:
    with pytest.raises(Cancelled):
        finish_name(finished(reason))


def test_an_infinite_logprob_becomes_a_finite_number() -> None:
    assert clamp_logprob(-math.inf) == -9999.0
    assert clamp_logprob(-0.5) == -0.5


async def test_interleaved_answers_are_collected_in_order() -> None:
    async def events(items: Sequence[tuple[int, TextDelta | Finished]]) -> AsyncIterator[tuple[int, TextDelta | Finished]]:
        for item in items:
            yield item

    counter = UsageCounter(per_prompt=2)
    texts = [(1, TextDelta(text="b")), (0, TextDelta(text="a")), (0, TextDelta(text="c"))]
    items = [*texts, (1, finished(FinishReason.LENGTH)), (0, finished())]
    first, second = await collect(events(items), 2, counter)
    assert ("".join(first.text), first.finish) == ("ac", "stop")
    assert ("".join(second.text), second.finish) == ("b", "length")
    assert counter.ended == 2


def test_an_answer_of_empty_texts_is_empty() -> None:
    answer = CollectedAnswer()
    answer.add(TextDelta(text=""))
    assert answer.empty
    answer.add(TextDelta(text="x"))
    assert not answer.empty
