"""`meshd doctor`: in the daemon if one answers, otherwise here; its text, its JSON and its exit status."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from fake_api.rows_server import Api
from meshd.cli.doctor import render
from meshd.state import lock_state

Meshd = Callable[..., CompletedProcess[str]]


def _result(check: str, status: str = "ok", mend: str = "", subject: str = "") -> dict[str, Any]:
    return {"check": check, "status": status, "found": f"this is {status}", "mend": mend, "subject": subject}


def _serve(api: Api, *results: dict[str, Any]) -> None:
    steps = [
        {"check": result["check"], "done": number, "total": len(results), "results": [result]}
        for number, result in enumerate(results, 1)
    ]
    api.stream("/mesh/v1/doctor", [f"data: {json.dumps(step)}\n\n".encode() for step in steps] + [b"data: [DONE]\n\n"])


@pytest.fixture
def without_backends(monkeypatch: pytest.MonkeyPatch, unused_tcp_port_factory: Callable[[], int]) -> None:
    """Local checks without the one that loads the tensor libraries, with free ports."""
    import meshd.doctor

    monkeypatch.setattr(meshd.doctor, "CHECKS", tuple(check for check in meshd.doctor.CHECKS if check.id != "backend"))
    monkeypatch.setenv("MESHD_LINK", f"0.0.0.0:{unused_tcp_port_factory()}")
    monkeypatch.setenv("MESHD_DISCOVERY", "mdns,static")
    monkeypatch.setenv("MESHD_CONFIG", os.devnull)


def test_the_daemon_runs_the_checks_and_warnings_are_no_failure(meshd: Meshd, api: Api) -> None:
    _serve(api, _result("swap"), _result("link-port"), _result("clock", "warning", "set it"))
    done = meshd("doctor", "--api", api.url)
    lines = done.stdout.splitlines()
    assert lines[0] == f"ok         daemon: the daemon at {api.url} answers"
    assert lines.index("ok         link-port: this is ok") < lines.index("ok         swap: this is ok")
    assert lines[lines.index("warning    clock: this is warning") + 1] == "           -> set it"
    assert lines[-1] == "nothing is wrong: 1 warnings, 0 unchecked, 4 ok"
    assert (done.returncode, done.stderr) == (0, "")
    assert api.bodies == [{}]


def test_a_fault_is_exit_status_1_also_as_json(meshd: Meshd, api: Api) -> None:
    _serve(api, _result("peer-dials-back", "wrong", "sudo ufw allow 6375/tcp", "desk"))
    done = meshd("doctor", "smollm2:135m", "--json", "--api", api.url)
    document = json.loads(done.stdout)
    assert (done.returncode, document["healthy"]) == (1, False)
    assert document["checks"][-1] == _result("peer-dials-back", "wrong", "sudo ufw allow 6375/tcp", "desk")
    assert api.bodies == [{"model": "smollm2:135m"}]


@pytest.mark.usefixtures("without_backends")
def test_without_a_daemon_it_says_so_first_and_checks_what_it_can(meshd: Meshd, tmp_path: Path) -> None:
    done = meshd("doctor", "--json")
    checks = json.loads(done.stdout)["checks"]
    assert (checks[0]["check"], checks[0]["status"]) == ("daemon", "warning")
    assert "only what needs no daemon is checked" in checks[0]["found"]
    assert "meshd up" in checks[0]["mend"]
    assert {"link-port", "state-disk", "memory", "identity"} <= {row["check"] for row in checks}
    assert done.returncode == 0, [row for row in checks if row["status"] == "wrong"]


@pytest.mark.usefixtures("without_backends")
def test_a_daemon_that_was_named_and_does_not_answer_is_a_fault(meshd: Meshd, unused_tcp_port: int) -> None:
    done = meshd("doctor", "--json", "--api", f"http://127.0.0.1:{unused_tcp_port}")
    assert json.loads(done.stdout)["checks"][0]["status"] == "wrong"
    assert done.returncode == 1


@pytest.mark.usefixtures("without_backends")
def test_a_daemon_that_hangs_is_a_fault(meshd: Meshd, tmp_path: Path, unused_tcp_port: int) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    with lock_state(tmp_path / "state") as lock:
        lock.announce(f"127.0.0.1:{unused_tcp_port}")
        checks = json.loads(meshd("doctor", "--json").stdout)["checks"]
    assert checks[0]["status"] == "wrong"
    [locked] = [row for row in checks if row["check"] == "state-lock"]
    assert f"kill {os.getpid()}" in locked["mend"]


@pytest.mark.usefixtures("without_backends")
def test_an_older_daemon_and_a_missing_key_are_told(meshd: Meshd, api: Api) -> None:
    [first, *_] = json.loads(meshd("doctor", "--json", "--api", api.url).stdout)["checks"]
    assert "can't run the checks" in first["found"]
    assert "same version" in first["mend"]
    api.answer("POST", "/mesh/v1/doctor", {"error": {"message": "a key is needed", "code": "no"}}, 401)
    [first, *_] = json.loads(meshd("doctor", "--json", "--api", api.url).stdout)["checks"]
    assert "--api-key" in first["mend"]


@pytest.mark.usefixtures("without_backends")
def test_a_setting_that_can_not_be_read_is_one_fault_among_the_checks(meshd: Meshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHD_MEMORY", "lots")
    done = meshd("doctor", "--json")
    checks = json.loads(done.stdout)["checks"]
    [setting] = [row for row in checks if row["check"] == "settings"]
    assert "'lots' is not a size" in setting["found"]
    assert "memory" in {row["check"] for row in checks}
    assert done.returncode == 1


def test_a_daemon_that_runs_the_checks_for_somebody_else_is_asked_again_later(meshd: Meshd, api: Api) -> None:
    api.answer("POST", "/mesh/v1/doctor", {"error": {"message": "another `meshd doctor` runs", "code": "overloaded"}}, 429)
    done = meshd("doctor", "--api", api.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert "another `meshd doctor` runs" in done.stderr


def test_what_peers_say_does_not_command_the_terminal(meshd: Meshd, api: Api) -> None:
    _serve(api, _result("peer-refused", "wrong", "do", "desk") | {"found": "\x1b[2Jhello"})
    assert "\x1b" not in meshd("doctor", "--api", api.url).stdout


def test_subjects_are_shown() -> None:
    assert "WRONG      backend torch: this is wrong" in render([_result("backend", "wrong", "x", "torch")])
