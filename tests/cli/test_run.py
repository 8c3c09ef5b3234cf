import io
import json
from collections.abc import Callable
from subprocess import CompletedProcess

import pytest

from fake_api.rows_server import Api

Meshd = Callable[..., CompletedProcess[str]]
CHAT = "/v1/chat/completions"
HEADERS = {"x-meshd-plan": "ash:0-10,birch:10-30", "x-meshd-predicted-tpot-ms": "20"}


def _chunks(*texts: str) -> list[bytes]:
    deltas = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}]
    deltas += [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts]
    deltas.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": len(texts)}}
    return [f"data: {json.dumps(event)}\n\n".encode() for event in (*deltas, usage)] + [b"data: [DONE]\n\n"]


def test_an_answer_is_streamed_to_stdout_and_its_figures_beside_it(meshd: Meshd, api: Api) -> None:
    api.stream(CHAT, _chunks("The sky", " is ", "blüe"), HEADERS)
    outcome = meshd("run", "smollm2:135m", "Why?", "--api", api.url)
    assert (outcome.returncode, outcome.stdout) == (0, "The sky is blüe\n")
    assert "3 tokens" in outcome.stderr
    assert "predicted 50.0 tokens/s" in outcome.stderr
    assert "ash:0-10,birch:10-30" in outcome.stderr
    assert meshd("run", "m", "Why?", "--quiet", "--api", api.url).stderr == ""


def test_what_is_asked_goes_out_and_nothing_else(meshd: Meshd, api: Api) -> None:
    api.stream(CHAT, _chunks("x"))
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


def test_the_prompt_may_come_from_stdin(meshd: Meshd, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.stream(CHAT, _chunks("x"))
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    meshd("run", "m", "--api", api.url)
    assert api.bodies[0]["messages"] == [{"role": "user", "content": "from a pipe"}]


def test_no_prompt_at_all_is_wrong_usage(meshd: Meshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    outcome = meshd("run", "m")
    assert outcome.returncode == 2
    assert "the prompt is empty" in outcome.stderr


def test_the_whole_answer_is_one_document(meshd: Meshd, api: Api) -> None:
    api.answer("POST", CHAT, {"id": "chatcmpl-1", "choices": []})
    assert json.loads(meshd("run", "m", "Why?", "--json", "--api", api.url).stdout)["id"] == "chatcmpl-1"
    assert "stream" not in api.bodies[0]


def test_a_model_that_still_loads_is_waited_for(meshd: Meshd, api: Api) -> None:
    api.stream(CHAT, _chunks("now"))
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


def test_an_answer_that_fails_midway_keeps_what_came_and_fails(meshd: Meshd, api: Api) -> None:
    error = b'data: {"error": {"message": "cedar is gone", "code": "peer_lost"}}\n\n'
    api.stream(CHAT, [*_chunks("The sky")[:2], error])
    outcome = meshd("run", "m", "Why?", "--api", api.url)
    assert (outcome.returncode, outcome.stdout.strip()) == (1, "The sky")
    assert "meshd: cedar is gone" in outcome.stderr


def test_a_conversation_remembers_its_turns(meshd: Meshd, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.answer("GET", "/health", {"status": "ok"})
    api.stream(CHAT, _chunks("Hello", "!"))
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n\nAnd?\n/new\nAgain\n/quit\nnever\n"))
    outcome = meshd("chat", "m", "--system", "Be kind.", "--api", api.url)
    assert (outcome.returncode, outcome.stdout) == (0, "Hello!\n" * 3)
    turns = [[message["content"] for message in body["messages"]] for body in api.bodies]
    assert turns == [["Be kind.", "Hi"], ["Be kind.", "Hi", "Hello!", "And?"], ["Be kind.", "Again"]]
