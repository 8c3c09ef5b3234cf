"""`meshd invite`, against a server that answers like a daemon, and `meshd up --join` before it reaches one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from aiohttp import web

from fake_api.rows_server import Api

Meshd = Callable[..., CompletedProcess[str]]


def step(state: str = "waiting", **fields: Any) -> dict[str, Any]:
    return {"state": state, "number": 7, "code": "", "left_s": 599.0, "tries_left": 3, "joined": "", "addresses": [], **fields}


@pytest.fixture
def invited(api: Api, meshd: Meshd) -> Callable[..., CompletedProcess[str]]:
    """Runs `meshd invite` on a daemon whose invite has these steps after the first one."""

    def run(*steps: dict[str, Any], words: tuple[str, ...] = ()) -> CompletedProcess[str]:
        first = step(code="7-amber-lion", addresses=["192.0.2.1:6376"])
        body = "".join(f"data: {json.dumps(each)}\n\n" for each in (first, *steps)) + "data: [DONE]\n\n"

        async def stream(_: web.Request) -> web.Response:
            return web.Response(text=body, content_type="text/event-stream")

        api.routes["POST", "/mesh/v1/invites"] = stream
        return meshd("invite", "--api", api.url, *words)

    return run


def test_the_code_is_printed_with_what_to_type_and_then_who_has_joined(invited: Callable[..., CompletedProcess[str]]) -> None:
    outcome = invited(step(), step(joined="attic"), step("joined", joined="attic"))
    assert outcome.returncode == 0
    assert outcome.stdout == "7-amber-lion\njoined: attic\n"
    assert "meshd up --join 7-amber-lion\n" in outcome.stderr
    assert "meshd up --join 7-amber-lion@192.0.2.1:6376\n" in outcome.stderr
    assert "three wrong tries" in outcome.stderr


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("tries", "three wrong tries"),
        ("expired", "time is over"),
        ("closed", "closed from elsewhere"),
        ("failed", "log"),
        ("sent", "attic"),
    ],
)
def test_an_invite_without_a_device_is_an_error(invited: Callable[..., CompletedProcess[str]], state: str, said: str) -> None:
    outcome = invited(step(tries_left=2), step(state, joined="attic" if state == "sent" else ""))
    assert outcome.returncode == 1
    assert said in outcome.stderr.splitlines()[-1]


def test_json_has_a_line_for_each_change(invited: Callable[..., CompletedProcess[str]]) -> None:
    outcome = invited(step(), step(left_s=1.0), step(tries_left=2), step("expired", tries_left=2), words=("--json",))
    lines = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert [(line["state"], line["tries_left"]) for line in lines[1:]] == [("waiting", 3), ("waiting", 2), ("expired", 2)]
    assert lines[0]["code"] == "7-amber-lion"
    assert outcome.returncode == 1


@pytest.mark.parametrize(("closed", "said"), [(1, "is closed"), (0, "no invite")])
def test_an_invite_is_closed(api: Api, meshd: Meshd, closed: int, said: str) -> None:
    api.answer("DELETE", "/mesh/v1/invites", {"closed": closed})
    assert said in meshd("invite", "--close", "--api", api.url).stdout
    assert json.loads(meshd("invite", "--close", "--json", "--api", api.url).stdout) == {"closed": closed}


@pytest.mark.parametrize("code", ["7-amber", "7-amber-lyon", "x", "7-amber-lion@", "7-amber-lion@host", "7-amber-lion@host:99999"])
def test_a_mistyped_code_is_wrong_usage(meshd: Meshd, code: str, tmp_path: Path) -> None:
    outcome = meshd("up", "--join", code)
    assert outcome.returncode == 2
    assert outcome.stderr.count("\n") == 1
    assert not (tmp_path / "state" / "cluster.key").exists()


def test_a_device_with_a_cluster_does_not_join_another_one(meshd: Meshd) -> None:
    code = meshd("key", "new").stdout
    outcome = meshd("up", "--join", "7-amber-lion")
    assert outcome.returncode == 2
    assert "belongs to cluster" in outcome.stderr
    assert "without --join" in outcome.stderr
    assert meshd("key", "show").stdout == code


def test_join_and_key_exclude_one_another(meshd: Meshd) -> None:
    outcome = meshd("up", "--join", "7-amber-lion", "--key", "mesh-X")
    assert outcome.returncode == 2
    assert "give one of them" in outcome.stderr


def test_a_listener_that_does_not_exist_is_given_up(meshd: Meshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshd.agents.links.pairing.joiner.Joiner.join.__defaults__", (0.5,))
    outcome = meshd("up", "--join", "7-amber-lion@127.0.0.1:1", "--discovery", "static", "--config", os.devnull)
    assert outcome.returncode == 1
    assert "no invite with number 7" in outcome.stderr
