import io
from collections.abc import Callable
from subprocess import CompletedProcess

import pytest

from fake_api.chat_events import CHAT, chat_events
from fake_api.rows_server import Api

Meshd = Callable[..., CompletedProcess[str]]


def test_a_conversation_sends_its_earlier_turns(meshd: Meshd, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.answer("GET", "/health", {"status": "ok"})
    api.stream(CHAT, chat_events("Hello", "!"))
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n\nAnd?\n/new\nAgain\n/quit\nnever\n"))
    outcome = meshd("chat", "m", "--system", "Be kind.", "--api", api.url)
    assert (outcome.returncode, outcome.stdout) == (0, "Hello!\n" * 3)
    turns = [[message["content"] for message in body["messages"]] for body in api.bodies]
    assert turns == [["Be kind.", "Hi"], ["Be kind.", "Hi", "Hello!", "And?"], ["Be kind.", "Again"]]


def test_an_answer_that_fails_ends_a_piped_conversation(meshd: Meshd, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.answer("GET", "/health", {"status": "ok"})
    api.answer("POST", CHAT, {"error": {"message": "cedar is gone", "code": "peer_lost"}}, status=502)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nnever\n"))
    outcome = meshd("chat", "m", "--api", api.url)
    assert (outcome.returncode, outcome.stderr) == (1, "meshd: cedar is gone\n")
    assert len(api.bodies) == 1
