from collections.abc import Callable
from subprocess import CompletedProcess

import pytest

from fake_api.chat_events import CHAT, chat_events
from fake_api.rows_server import Api
from meshd.cli.support.answering import AnswerSummary

Meshd = Callable[..., CompletedProcess[str]]


def test_a_request_has_only_the_flags_that_were_given(meshd: Meshd, api: Api) -> None:
    api.stream(CHAT, chat_events("x"))
    words = (
        "--system",
        "Be brief.",
        "--seed",
        "7",
        "--temperature",
        "0",
        "--stop",
        "a",
        "--stop",
        "b",
        "--min-peers",
        "2",
        "--peers",
        "a,b",
    )
    meshd("run", "m", "Why?", *words, "--api", api.url)
    assert api.bodies == [
        {
            "model": "m",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
            "temperature": 0.0,
            "seed": 7,
            "stop": ["a", "b"],
            "mesh": {"peers": ["a", "b"], "min_peers": 2},
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_run_waits_for_a_model_that_still_loads(meshd: Meshd, api: Api) -> None:
    api.stream(CHAT, chat_events("now"))
    ready, calls = api.routes["POST", CHAT], 0
    api.answer("POST", CHAT, {"error": {"message": "it is being loaded", "code": "model_loading"}}, 503, {"Retry-After": "0"})
    loading = api.routes["POST", CHAT]

    async def first_loading(request: object) -> object:
        nonlocal calls
        calls += 1
        return await (loading if calls == 1 else ready)(request)  # type: ignore[arg-type]

    api.routes["POST", CHAT] = first_loading  # type: ignore[assignment]
    outcome = meshd("run", "m", "Why?", "--api", api.url)
    assert (outcome.returncode, outcome.stdout) == (0, "now\n")
    assert "it is being loaded; waiting" in outcome.stderr


def test_an_answer_that_fails_midway_prints_its_text_and_fails(meshd: Meshd, api: Api) -> None:
    error = b'data: {"error": {"message": "cedar is gone", "code": "peer_lost"}}\n\n'
    api.stream(CHAT, [*chat_events("The sky")[:2], error])
    outcome = meshd("run", "m", "Why?", "--api", api.url)
    assert (outcome.returncode, outcome.stdout.strip()) == (1, "The sky")
    assert "meshd: cedar is gone" in outcome.stderr


def _summary(*, tokens: int, decode_s: float, predicted_tpot_s: float = 0.0, predicted_ttft_s: float = 0.0) -> AnswerSummary:
    return AnswerSummary(
        text="x", finish="stop", plan="a:0-1", predicted_tpot_s=predicted_tpot_s, prompt_tokens=3, completion_tokens=tokens,
        predicted_ttft_s=predicted_ttft_s, ttft_s=0.25, decode_s=decode_s,
    )  # fmt: skip


@pytest.mark.parametrize(("tokens", "decode_s", "rate"), [(11, 2.0, 5.0), (1, 2.0, 0.0), (0, 0.0, 0.0), (5, 0.0, 0.0)])
def test_the_rate_counts_the_tokens_after_the_first(tokens: int, decode_s: float, rate: float) -> None:
    assert _summary(tokens=tokens, decode_s=decode_s).tokens_s == rate


def test_a_summary_shows_a_prediction_only_if_there_is_one() -> None:
    text = "11 tokens, 5.0 tokens/s, first after 250 ms"
    assert _summary(tokens=11, decode_s=2.0).summary() == f"{text}; a:0-1"
    assert _summary(tokens=11, decode_s=2.0, predicted_tpot_s=0.1).summary() == f"{text}, predicted 10.0 tokens/s; a:0-1"
    both = _summary(tokens=11, decode_s=2.0, predicted_tpot_s=0.1, predicted_ttft_s=0.24).summary()
    assert both == f"{text}, predicted 10.0 tokens/s, first after 240 ms; a:0-1"
