import json
from collections.abc import Callable
from subprocess import CompletedProcess

import pytest
from aiohttp import web

from fake_api.rows_server import Api
from meshd.cli import drain

Meshd = Callable[..., CompletedProcess[str]]


def _left(api: Api, *left: int) -> None:
    """One answer after another; the last one stays."""
    answers = list(left)

    async def handler(_: web.Request) -> web.Response:
        count = answers.pop(0) if len(answers) > 1 else answers[0]
        return web.json_response({"peer": "p" * 52, "name": "attic", "sessions_left": count})

    api.routes["POST", "/mesh/v1/drain"] = handler


def test_a_drain_shows_the_sessions_that_are_left_until_none_is(meshd: Meshd, api: Api) -> None:
    _left(api, 2, 1, 0)
    outcome = meshd("drain", "attic", "--api", api.url)
    assert outcome.returncode == 0
    assert outcome.stdout.startswith("attic is drained")
    assert outcome.stderr == (
        "draining attic: 2 sessions left 0 %\ndraining attic: 1 session left 50 %\ndraining attic: 0 sessions left 100 %\n"
    )
    assert [(body["peer"], body["undo"]) for body in api.bodies] == [("attic", False)] * 3


def test_a_peer_that_nothing_runs_on_is_drained_at_once(meshd: Meshd, api: Api) -> None:
    _left(api, 0)
    assert meshd("drain", "attic", "--api", api.url).returncode == 0
    assert len(api.bodies) == 1


def test_what_does_not_move_in_time_fails_the_command_and_says_what_next(meshd: Meshd, api: Api) -> None:
    _left(api, 1)
    outcome = meshd("drain", "attic", "--timeout", "0", "--api", api.url)
    assert (outcome.returncode, outcome.stdout) == (1, "")
    assert "meshd: attic is not drained after 0 s: 1 session left there; it keeps draining" in outcome.stderr
    assert "--undo" in outcome.stderr


def test_no_request_waits_longer_than_the_time_that_is_left(meshd: Meshd, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    _left(api, 3)
    now = iter([100.0, 100.0, 101.0, 101.75, 102.5])
    monkeypatch.setattr(drain, "time", type("Time", (), {"monotonic": staticmethod(lambda: next(now))}))
    assert meshd("drain", "attic", "--timeout", "2", "--api", api.url).returncode == 1
    assert [body["timeout_s"] for body in api.bodies] == [0.0, 1.0, 1.0, 0.25, 0.0]


def test_undo_gives_it_work_again(meshd: Meshd, api: Api) -> None:
    _left(api, 4)
    outcome = meshd("drain", "attic", "--undo", "--api", api.url)
    assert (outcome.returncode, outcome.stdout) == (0, "attic takes work again\n")
    assert api.bodies == [{"peer": "attic", "undo": True, "timeout_s": 0.0}]


def test_a_migration_tells_where_it_runs_now_and_what_it_cost(meshd: Meshd, api: Api) -> None:
    session = "10d4" * 8
    api.answer("POST", "/mesh/v1/migrate", {"session": session, "plan": "ash:0-12,attic:12-30", "pause_ms": 31.25})
    outcome = meshd("migrate", "10d4", "attic", "--from", "birch", "--api", api.url)
    assert (outcome.returncode, outcome.stdout) == (0, f"{session} runs on ash:0-12,attic:12-30: a pause of 31.2 ms\n")
    assert "moving 10d4: to attic" in outcome.stderr
    meshd("migrate", session, "attic", "--api", api.url)
    assert api.bodies == [{"session": "10d4", "target": "attic", "source": "birch"}, {"session": session, "target": "attic"}]


def test_a_migration_that_fails_is_one_line(meshd: Meshd, api: Api) -> None:
    error = {"message": "no live peer runs or keeps session 10d4", "code": "session_not_found"}
    api.answer("POST", "/mesh/v1/migrate", {"error": error}, status=404)
    outcome = meshd("migrate", "10d4", "attic", "--api", api.url)
    assert (outcome.returncode, outcome.stdout) == (1, "")
    assert outcome.stderr.endswith("meshd: no live peer runs or keeps session 10d4\n")


BIRCH = "b" * 52
STORY = [
    {"at_s": 0.0, "peer": "a", "name": "ash", "what": "planned", "epoch": 1, "plan": "ash:0-12,birch:12-30", "tokens": 0},
    {"at_s": 0.0125, "peer": BIRCH, "name": "birch", "what": "opened", "stage": 1, "error": ""},
    {
        "at_s": 1.5, "peer": "a", "name": "ash", "what": "resumed", "method": "replay", "pause_ms": 310.123456789,
        "stages": [{"held": 0, "start": 0}, {"held": 7, "start": 7}],
    },
    {"at_s": 2.0, "peer": "c", "name": "cedar", "what": "gave no answer", "why": "it is\ngone"},
    {"at_s": 2.5, "peer": "a", "name": "ash", "what": "mirror", "target": BIRCH, "blame": "c" * 52},
]  # fmt: skip


def test_a_story_is_a_line_for_each_event(meshd: Meshd, api: Api) -> None:
    api.answer("GET", "/mesh/v1/sessions/10d4/story", {"object": "list", "data": STORY})
    outcome = meshd("debug", "story", "10d4", "--api", api.url)
    assert outcome.returncode == 0
    assert [line.split(maxsplit=3) for line in outcome.stdout.splitlines()[1:]] == [
        ["0.000", "s", "ash", "planned: epoch 1, plan ash:0-12,birch:12-30, tokens 0"],
        ["0.013", "s", "birch", "opened: stage 1"],
        ["1.500", "s", "ash", "resumed: method replay, pause_ms 310.123, stages [held 0 start 0; held 7 start 7]"],
        ["2.000", "s", "cedar", "gave no answer: why it is gone"],
        ["2.500", "s", "ash", "mirror: target birch, blame cccccccc"],
    ]
    assert json.loads(meshd("debug", "story", "10d4", "--json", "--api", api.url).stdout) == {"object": "list", "data": STORY}


def test_an_odd_session_stays_one_part_of_the_path(meshd: Meshd, api: Api) -> None:
    outcome = meshd("debug", "story", "../peers?x", "--api", api.url)
    assert outcome.returncode == 1
    assert "no route" in outcome.stderr


def test_debug_needs_a_deed(meshd: Meshd) -> None:
    outcome = meshd("debug")
    assert outcome.returncode == 2
    assert "see `meshd debug --help`" in outcome.stderr
