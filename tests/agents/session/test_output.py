"""One answer's tokens, text and times, new and restored from a record."""

import asyncio
from typing import Any

import msgspec
import pytest

from in_process.clusters import make_card
from in_process.journals import record
from meshd.agents.session.output import AnswerOutput
from meshd.types import FinishReason, SamplingParams, TokenLogprobs
from sim.toy.text import letter, toy_text

CARD = make_card()
EOS = CARD.end_of_sequence[0]


def output(*tokens: int, **fields: Any) -> AnswerOutput:
    """Make the output of an answer of at most four tokens. Its record already has `tokens`."""
    given = msgspec.structs.replace(record(), max_tokens=4, tokens=tuple((token, None) for token in tokens))
    return AnswerOutput(msgspec.structs.replace(given, **fields), CARD, toy_text(CARD), started=10.0)


def push(answer: AnswerOutput, *tokens: int) -> None:
    for token in tokens:
        answer.add(token, None, 11.0)
        answer.decode(token, None, end_of_sequence=False)


def text_of(answer: AnswerOutput) -> str:
    return "".join(delta.text for delta in answer.deltas)


def test_times_count_from_the_last_start() -> None:
    answer = output()
    assert (answer.ttft_s, answer.tpot_s) == (0.0, 0.0)
    answer.add(7, None, 12.0)
    assert (answer.ttft_s, answer.tpot_s) == (2.0, 0.0)
    answer.add(8, None, 12.5)
    answer.add(9, None, 13.0)
    assert (answer.ttft_s, answer.tpot_s) == (2.0, 0.5)
    answer.restart(20.0)
    assert answer.ttft_s == 0.0
    answer.add(5, None, 21.0)
    assert (answer.ttft_s, answer.tpot_s) == (1.0, 0.0)
    answer.add(6, None, 21.5)
    assert answer.tpot_s == 0.5, "tokens from before the suspension do not count"


def test_nothing_follows_a_stop_string() -> None:
    answer = output(stop=(letter(8) + letter(9),))
    push(answer, 7, 8)
    assert text_of(answer) == letter(7)
    assert not answer.stopped
    push(answer, 9, 10)
    assert answer.stopped
    assert text_of(answer) == letter(7)


def test_the_end_emits_the_withheld_text_and_has_an_effect_only_once() -> None:
    answer = output(stop=(letter(8) + letter(9),))
    push(answer, 7, 8)
    answer.finish(FinishReason.LENGTH)
    assert text_of(answer) == letter(7) + letter(8)
    first = answer.finished
    assert first is not None
    assert (first.reason, first.prompt_tokens, first.completion_tokens) == (FinishReason.LENGTH, 3, 2)
    answer.finish(FinishReason.STOP)
    assert answer.finished is first


def test_a_stop_string_takes_precedence_as_finish_reason() -> None:
    answer = output(stop=(letter(8),))
    push(answer, 8)
    answer.finish(FinishReason.LENGTH)
    assert answer.finished is not None
    assert answer.finished.reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("index", "token", "ignore_eos", "finish"),
    [
        (0, 7, False, None),
        (0, EOS, False, FinishReason.STOP),
        (0, EOS, True, None),
        (2, 7, False, None),
        (3, 7, False, FinishReason.LENGTH),
        (3, EOS, False, FinishReason.STOP),
        (3, EOS, True, FinishReason.LENGTH),
    ],
)
def test_an_answer_ends_with_an_end_token_or_at_its_limit(
    index: int, token: int, ignore_eos: bool, finish: FinishReason | None
) -> None:
    assert output(ignore_eos=ignore_eos).finish_at(index, token) is finish


@pytest.mark.parametrize(
    ("tokens", "fields", "finish"),
    [
        ((), {}, None),
        ((7, 8), {}, None),
        ((7, EOS), {}, FinishReason.STOP),
        ((7, 8), {"stop": (letter(8),)}, FinishReason.STOP),
        ((7, 8, 9, 10), {}, FinishReason.LENGTH),
        ((7,), {"finish": "cancelled"}, FinishReason.CANCELLED),
    ],
    ids=["no token", "runs", "end token", "stop string", "length", "as recorded"],
)
async def test_a_restored_answer_knows_how_it_ended(
    tokens: tuple[int, ...], fields: dict[str, Any], finish: FinishReason | None
) -> None:
    answer = output(*tokens, **fields)
    assert await answer.restore() is finish
    assert [token for token, _ in answer.tokens] == list(tokens)


async def test_a_restored_answer_has_the_same_text_as_one_that_ran_through() -> None:
    stop = (letter(8) + letter(9),)
    ran, restored = output(stop=stop), output(7, 8, stop=stop)
    push(ran, 7, 8, 10)
    await restored.restore()
    push(restored, 10)
    assert text_of(restored) == text_of(ran) == letter(7) + letter(8) + letter(10)


def test_logprobs_are_emitted_only_if_they_were_requested() -> None:
    for logprobs, shown in ((None, 0), (0, 1)):
        answer = output(sampling=SamplingParams(logprobs=logprobs))
        answer.decode(7, TokenLogprobs(-0.5), end_of_sequence=False)
        assert [len(delta.tokens) for delta in answer.deltas] == [shown]


async def test_each_touch_wakes_waiting_tasks_and_conditions_are_checked_again() -> None:
    answer = output()
    waiting = asyncio.create_task(answer.until(lambda: len(answer.tokens) == 2, within_s=5.0))
    once = asyncio.create_task(answer.change())
    await asyncio.sleep(0)
    answer.add(7, None, 11.0)
    answer.touch()
    await once
    assert not waiting.done()
    answer.add(8, None, 11.0)
    answer.touch()
    await waiting


async def test_waiting_ends_without_an_error_when_the_time_is_over() -> None:
    await output().until(lambda: False, within_s=0.01)


async def test_other_tasks_run_while_a_long_answer_is_restored() -> None:
    answer = output(*range(7, 17), max_tokens=10_000)
    answer.record = msgspec.structs.replace(answer.record, tokens=answer.record.tokens * 200)
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(count_turns())
    await answer.restore()
    other.cancel()
    assert len(answer.tokens) == 2000
    assert turns >= 20
