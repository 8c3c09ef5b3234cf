"""The steps of `meshd demo`, against a server that answers like its daemons. `tests/cluster/test_demo.py` runs it whole."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_api.chat_events import CHAT, chat_events
from fake_api.rows_server import Api
from meshd.cli import demo
from meshd.cli.support.children import ChildDaemon
from meshd.cli.support.client import Daemon
from meshd.errors import NotReady, RemoteFailure

SPLIT = "ash:0-12,birch:12-20,cedar:20-30"
WORDS = tuple(f" word{number}" for number in range(demo.KILL_AFTER + 2))


@pytest.fixture
def lines() -> list[str]:
    """The lines that a step passes to `say`."""
    return []


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[ChildDaemon]:
    """A child process that runs until it is killed."""
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        yield ChildDaemon("cedar", tmp_path / "cedar", process)
        process.kill()


def _serve_peers(api: Api, name: str, *found: str, state: str = "alive") -> Daemon:
    """Answer as the daemon `name` that has found these peers."""
    rows = [{"name": other, "state": state, "capability": {"backend": "native"}, "sources": ["mdns"]} for other in found]
    api.answer("GET", f"/{name}/mesh/v1/peers", {"data": rows})
    return Daemon(f"{api.url}/{name}")


def test_the_demo_waits_until_every_daemon_has_found_the_others(api: Api, lines: list[str], victim: ChildDaemon) -> None:
    children = [ChildDaemon(name, victim.state, victim.process) for name in demo.NAMES]
    apis = [_serve_peers(api, name, *demo.NAMES) for name in demo.NAMES]
    demo._show_discovery(children, apis, lines.append)
    assert sorted(lines) == [f"{one} found {other} (mdns)" for one in demo.NAMES for other in demo.NAMES if one != other]


def test_a_peer_that_is_found_but_not_alive_does_not_count(
    api: Api, lines: list[str], victim: ChildDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "FIND_WITHIN_S", 0.0)
    children = [ChildDaemon(name, victim.state, victim.process) for name in ("ash", "birch")]
    apis = [_serve_peers(api, "ash", "birch"), _serve_peers(api, "birch", "ash", state="found")]
    with pytest.raises(NotReady, match="finding one another did not finish within 0 s"):
        demo._show_discovery(children, apis, lines.append)
    assert lines == ["ash found birch (mdns)"]


def test_the_demo_waits_for_both_directions_of_every_link(api: Api, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"hop_s": 1e-4 * count} for count in (3, 1, 2, 6, 5, 4)]
    api.answer("GET", "/mesh/v1/links", {"data": rows})
    demo._show_links(Daemon(api.url), lines.append)
    assert lines == ["links measured both ways: a small message takes 100 us to 600 us"]
    api.answer("GET", "/mesh/v1/links", {"data": rows[1:]})
    monkeypatch.setattr(demo, "MEASURE_WITHIN_S", 0.0)
    with pytest.raises(NotReady, match="measuring the links"):
        demo._show_links(Daemon(api.url), lines.append)


def test_the_model_is_placed_on_three_peers_as_planned(api: Api, lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    api.answer("POST", "/mesh/v1/plan", {"plan": SPLIT, "text": ["the plan", "its speed"]})
    steps = [
        {"name": name, "layers": layers, "state": "active", "progress": 1.0, "message": ""}
        for name, layers in (("birch", [12, 20]), ("ash", [0, 12]), ("cedar", [20, 30]))
    ]
    api.stream("/mesh/v1/place", [f"data: {json.dumps(step)}\n\n".encode() for step in steps] + [b"data: [DONE]\n\n"])
    assert demo._show_placement(Daemon(api.url), lines.append) == SPLIT
    plan, place = api.bodies
    assert (plan["objective"], plan["mesh"]) == ("throughput", {"min_peers": 3})
    assert place == {"model": demo.MODEL, "stages": SPLIT, "context": plan["context"]}
    assert lines[1:] == ["ash holds layers 0-12", "birch holds layers 12-20", "cedar holds layers 20-30"]
    assert capsys.readouterr().out.split("\n")[:2] == [" " * 10 + "the plan", " " * 10 + "its speed"]


def test_missing_standby_copies_are_mentioned_and_do_not_end_the_demo(
    api: Api, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def holdings(*layers: str, standby: bool) -> dict[str, object]:
        return {"holdings": [{"layers": span, "state": "active", "standby": standby} for span in layers]}

    active, standby = holdings("0-12", "12-30", standby=False), holdings("12-30", "0-12", standby=True)
    api.answer("GET", "/mesh/v1/peers", {"data": [active, standby]})
    demo._show_standby(Daemon(api.url), lines.append)
    assert lines == ["a second device holds a copy of every layer: standby copies of 0-12, 12-30"]
    monkeypatch.setattr(demo, "STANDBY_WITHIN_S", 0.0)
    api.answer("GET", "/mesh/v1/peers", {"data": [active, holdings("0-12", standby=True)]})
    demo._show_standby(Daemon(api.url), lines.append)
    assert "no standby copy" in lines[-1]


def test_a_daemon_is_killed_in_mid_answer_and_the_answer_stays_the_same(
    api: Api, lines: list[str], victim: ChildDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    api.stream(CHAT, chat_events(*WORDS))
    expected = demo._show_answer(Daemon(api.url), "Why?", SPLIT)
    demo._show_loss(victim, Daemon(api.url), "Why?", SPLIT, expected, lines.append)
    assert victim.process.wait(10) == -signal.SIGKILL
    before, after = capsys.readouterr().out.split(" [cedar killed] ")
    assert before.endswith("".join(WORDS[: demo.KILL_AFTER]))
    assert after.startswith("".join(WORDS[demo.KILL_AFTER :]))
    assert "the same answer as before, word for word" in after
    assert api.bodies[0] == api.bodies[1]


def test_an_answer_that_changes_fails_the_demo(api: Api, lines: list[str], victim: ChildDaemon) -> None:
    api.stream(CHAT, chat_events("Something", " else"))
    expected = demo._show_answer(Daemon(api.url), "Why?", SPLIT)
    api.stream(CHAT, chat_events(*WORDS))
    with pytest.raises(RemoteFailure, match="the answer changed"):
        demo._show_loss(victim, Daemon(api.url), "Why?", SPLIT, expected, lines.append)


def test_no_daemon_is_killed_if_the_answer_is_too_short(
    api: Api, lines: list[str], victim: ChildDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    api.stream(CHAT, chat_events(*WORDS[:3]))
    expected = demo._show_answer(Daemon(api.url), "Why?", SPLIT)
    demo._show_loss(victim, Daemon(api.url), "Why?", SPLIT, expected, lines.append)
    assert victim.process.poll() is None
    assert "too short" in capsys.readouterr().out


def test_sigterm_interrupts_the_demo_and_its_handler_is_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), demo._ended_by_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with demo._ended_by_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
