from collections.abc import Callable
from subprocess import CompletedProcess

import pytest
from aiohttp import web

from fake_api.rows_server import Api
from meshd.cli import drain

Meshd = Callable[..., CompletedProcess[str]]


def _left(api: Api, *left: int) -> None:
    """Answer drain requests with these numbers of remaining sessions, one per request. The last number is repeated."""
    answers = list(left)

    async def handler(_: web.Request) -> web.Response:
        count = answers.pop(0) if len(answers) > 1 else answers[0]
        return web.json_response({"peer": "p" * 52, "name": "attic", "sessions_left": count})

    api.routes["POST", "/mesh/v1/drain"] = handler


def test_a_drain_shows_the_remaining_sessions_until_there_are_none(meshd: Meshd, api: Api) -> None:
    _left(api, 2, 1, 0)
    outcome = meshd("drain", "attic", "--api", api.url)
    assert outcome.returncode == 0
    assert outcome.stdout.startswith("attic is drained")
    assert outcome.stderr == (
        "draining attic: 2 sessions left 0 %\ndraining attic: 1 session left 50 %\ndraining attic: 0 sessions left 100 %\n"
    )
    assert [(body["peer"], body["undo"]) for body in api.bodies] == [("attic", False)] * 3


def test_a_peer_without_sessions_is_drained_at_once(meshd: Meshd, api: Api) -> None:
    _left(api, 0)
    assert meshd("drain", "attic", "--api", api.url).returncode == 0
    assert len(api.bodies) == 1


def test_a_drain_that_takes_too_long_fails_with_a_hint(meshd: Meshd, api: Api) -> None:
    _left(api, 1)
    outcome = meshd("drain", "attic", "--timeout", "0", "--api", api.url)
    assert (outcome.returncode, outcome.stdout) == (1, "")
    assert "meshd: attic is not drained after 0 s: 1 session left there; it keeps draining" in outcome.stderr
    assert "--undo" in outcome.stderr


def test_no_request_waits_longer_than_the_remaining_time(meshd: Meshd, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    _left(api, 3)
    now = iter([100.0, 100.0, 101.0, 101.75, 102.5])
    monkeypatch.setattr(drain, "time", type("Time", (), {"monotonic": staticmethod(lambda: next(now))}))
    assert meshd("drain", "attic", "--timeout", "2", "--api", api.url).returncode == 1
    assert [body["timeout_s"] for body in api.bodies] == [0.0, 1.0, 1.0, 0.25, 0.0]


def test_undo_lets_a_peer_take_work_again(meshd: Meshd, api: Api) -> None:
    _left(api, 4)
    outcome = meshd("drain", "attic", "--undo", "--api", api.url)
    assert (outcome.returncode, outcome.stdout) == (0, "attic takes work again\n")
    assert api.bodies == [{"peer": "attic", "undo": True, "timeout_s": 0.0}]
