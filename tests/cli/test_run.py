import io
import json
from collections.abc import Callable
from subprocess import CompletedProcess

import pytest

from fake_api.chat_events import CHAT, chat_events
from fake_api.rows_server import Api

Meshd = Callable[..., CompletedProcess[str]]
HEADERS = {"x-meshd-plan": "ash:0-10,birch:10-30", "x-meshd-predicted-tpot-ms": "20"}


def test_an_answer_goes_to_stdout_and_its_statistics_to_stderr(meshd: Meshd, api: Api) -> None:
    api.stream(CHAT, chat_events("The sky", " is ", "blüe"), HEADERS)
    outcome = meshd("run", "smollm2:135m", "Why?", "--api", api.url)
    assert (outcome.returncode, outcome.stdout) == (0, "The sky is blüe\n")
    assert "3 tokens" in outcome.stderr
    assert "predicted 50.0 tokens/s" in outcome.stderr
    assert "ash:0-10,birch:10-30" in outcome.stderr
    assert meshd("run", "m", "Why?", "--quiet", "--api", api.url).stderr == ""


def test_the_prompt_may_come_from_stdin(meshd: Meshd, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.stream(CHAT, chat_events("x"))
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    meshd("run", "m", "--api", api.url)
    assert api.bodies[0]["messages"] == [{"role": "user", "content": "from a pipe"}]


def test_a_model_without_recommended_sampling_gets_the_command_lines(meshd: Meshd, api: Api) -> None:
    api.stream(CHAT, chat_events("x"))
    api.answer("GET", "/v1/models/own", {"id": "own", "meshd": {"sampling": {"temperature": 0.3}}})
    api.answer("GET", "/v1/models/a/b:c", {"id": "a/b:c", "meshd": {"sampling": {}}})
    for model, flags, sampling in (
        ("own", (), {}),
        ("a/b:c", (), {"temperature": 0.6, "top_p": 0.9}),
        ("nosuch", (), {"temperature": 0.6, "top_p": 0.9}),
        ("a/b:c", ("--top-k", "5"), {"top_k": 5}),
    ):
        assert meshd("run", model, "Why?", *flags, "--api", api.url).returncode == 0
        assert {name: value for name, value in api.bodies[-1].items() if name in ("temperature", "top_p", "top_k")} == sampling


def test_what_the_model_thinks_goes_to_stderr(meshd: Meshd, api: Api) -> None:
    deltas = [{"choices": [{"index": 0, "delta": {"reasoning_content": text}}]} for text in ("hm", "m")]
    thoughts = [f"data: {json.dumps(delta)}\n\n".encode() for delta in deltas]
    role, *rest = chat_events("Blue", ".")
    api.stream(CHAT, [role, *thoughts, *rest])
    outcome = meshd("run", "m", "Why?", "--quiet", "--api", api.url)
    assert (outcome.stdout, outcome.stderr) == ("Blue.\n", "hmm\n\n")


def test_an_empty_prompt_is_wrong_usage(meshd: Meshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    outcome = meshd("run", "m")
    assert outcome.returncode == 2
    assert "the prompt is empty" in outcome.stderr


def test_the_whole_answer_is_one_document(meshd: Meshd, api: Api) -> None:
    api.answer("POST", CHAT, {"id": "chatcmpl-1", "choices": []})
    assert json.loads(meshd("run", "m", "Why?", "--json", "--api", api.url).stdout)["id"] == "chatcmpl-1"
    assert "stream" not in api.bodies[0]


def test_a_model_without_a_chat_template_continues_the_text(meshd: Meshd, api: Api) -> None:
    error = {"error": {"message": "base has no chat template", "code": "no_chat_template", "type": "invalid_request_error"}}
    api.answer("POST", CHAT, error, status=400)
    chunks = [{"choices": [{"index": 0, "text": text, "finish_reason": None}]} for text in (" blue", ".")]
    api.stream("/v1/completions", [*(f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks), b"data: [DONE]\n\n"])
    outcome = meshd("run", "base", "The sky is", "--max-tokens", "5", "--api", api.url)
    assert (outcome.returncode, outcome.stdout) == (0, " blue.\n")
    assert "base has no chat template: it continues the text" in outcome.stderr
    assert {name: api.bodies[-1].get(name) for name in ("prompt", "max_tokens", "messages")} == {
        "prompt": "The sky is",
        "max_tokens": 5,
        "messages": None,
    }
