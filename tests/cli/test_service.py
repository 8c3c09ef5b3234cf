"""`meshd service`: what it writes and which commands it gives. `systemctl` is a script here that records its calls.

The unit itself is verified in `support/test_units.py`, and readiness and watchdog with a real daemon in
`tests/cluster/test_service.py`.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

Meshd = Callable[..., CompletedProcess[str]]
SYSTEMCTL = """#!/bin/sh
echo "$@" >> "$SYSTEMCTL_CALLS"
case "$*" in
  *"$SYSTEMCTL_FAILS"*) echo "Failed to connect to bus" >&2; exit 1;;
  *show*) cat "$SYSTEMCTL_STATE";;
esac
"""
RUNS = """ActiveState=active
SubState=running
MainPID=77
NRestarts=2
Result=success
StatusText=up as attic
UnitFileState=enabled
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="systemd is on Linux only")


class Systemctl:
    """The recorded calls, and what the next ones answer."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._calls, self._state, self._monkeypatch = folder / "calls", folder / "answer", monkeypatch
        script = folder / "bin" / "systemctl"
        script.parent.mkdir()
        script.write_text(SYSTEMCTL)
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
        monkeypatch.setenv("SYSTEMCTL_CALLS", str(self._calls))
        monkeypatch.setenv("SYSTEMCTL_STATE", str(self._state))
        self.shows("ActiveState=inactive\n")
        self.fails_at("nothing")

    def shows(self, text: str) -> None:
        self._state.write_text(text)

    def fails_at(self, word: str) -> None:
        self._monkeypatch.setenv("SYSTEMCTL_FAILS", word)

    def calls(self) -> list[str]:
        """Return the calls since the last time that change something."""
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        self._calls.write_text("")
        return [line for line in lines if " show " not in line]


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systemctl:
    return Systemctl(tmp_path, monkeypatch)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    return tmp_path / "config/systemd/user/meshd.service"


def test_install_writes_the_unit_starts_it_and_says_what_to_type_next(meshd: Meshd, systemctl: Systemctl, unit: Path) -> None:
    outcome = meshd("service", "install", "--", "--name", "attic", "--memory", "4GiB")
    assert outcome.returncode == 0, outcome.stderr
    assert f"ExecStart={sys.executable} -P -m meshd up --name attic --memory 4GiB" in unit.read_text().splitlines()
    assert systemctl.calls() == ["--user daemon-reload", "--user enable meshd.service", "--user start meshd.service"]
    assert str(unit) in outcome.stdout
    assert "loginctl enable-linger" in outcome.stdout
    assert "journalctl --user -u meshd" in outcome.stdout
    assert "MESHD_STATE" in outcome.stdout  # set by the fixture, and not seen by a service


def test_installing_again_changes_nothing_and_other_settings_restart_it(meshd: Meshd, systemctl: Systemctl, unit: Path) -> None:
    assert meshd("service", "install").returncode == 0
    systemctl.calls()
    systemctl.shows(RUNS)
    outcome = meshd("service", "install")
    assert (outcome.returncode, systemctl.calls()) == (0, [])
    assert "installed already" in outcome.stdout
    assert meshd("service", "install", "--", "--threads", "2").returncode == 0
    assert systemctl.calls()[-1] == "--user restart meshd.service"
    assert "--threads 2" in unit.read_text()


@pytest.mark.parametrize(
    ("secret", "value"), [("--key", "mesh-SECRET"), ("--api-key", "SECRET"), ("--mqtt", "mqtts://me:SECRET@broker")]
)
def test_no_key_gets_into_the_unit(meshd: Meshd, systemctl: Systemctl, unit: Path, secret: str, value: str) -> None:
    outcome = meshd("service", "install", "--", secret, value)
    assert outcome.returncode == 2
    assert "not written into a unit" in outcome.stderr
    assert "SECRET" not in outcome.stderr
    assert not unit.exists()
    assert systemctl.calls() == []


def test_a_wrong_setting_is_refused_before_anything_is_written(meshd: Meshd, systemctl: Systemctl, unit: Path) -> None:
    outcome = meshd("service", "install", "--", "--threads", "many")
    assert outcome.returncode == 2
    assert "setting threads" in outcome.stderr
    assert not unit.exists()


def test_a_manager_that_fails_is_one_clear_error_and_leaves_nothing(meshd: Meshd, systemctl: Systemctl, unit: Path) -> None:
    systemctl.fails_at("daemon-reload")
    outcome = meshd("service", "install")
    assert outcome.returncode == 1
    assert outcome.stderr.startswith("meshd: `systemctl --user daemon-reload` failed: Failed to connect to bus; ")
    assert outcome.stderr.count("\n") == 1
    assert not unit.exists()


def test_a_daemon_that_does_not_start_is_not_started_at_the_next_boot(meshd: Meshd, systemctl: Systemctl, unit: Path) -> None:
    systemctl.fails_at("start meshd")
    assert meshd("service", "install").returncode == 1
    assert "--user disable --now meshd.service" in systemctl.calls()[3:]
    assert not unit.exists()


def test_a_failed_change_leaves_the_unit_of_before_and_its_daemon_running(meshd: Meshd, systemctl: Systemctl, unit: Path) -> None:
    assert meshd("service", "install").returncode == 0
    before = unit.read_text()
    systemctl.fails_at("restart")
    systemctl.calls()
    assert meshd("service", "install", "--", "--threads", "2").returncode == 1
    assert unit.read_text() == before
    assert systemctl.calls()[-3:] == ["--user daemon-reload", "--user enable meshd.service", "--user start meshd.service"]


def test_paths_are_written_in_full_and_the_variables_of_the_shell_do_not_count(
    meshd: Meshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MESHD_MODELS_DIR", "/not/seen")
    monkeypatch.setenv("MESHD_DRAIN_TIMEOUT", "3600")
    words = ("--state", "mesh", "--cache=cache", "--name", "mesh")
    text = meshd("service", "install", "--system", "--user", "root", "--print", "--", *words).stdout
    assert f"up --state {tmp_path}/mesh --cache={tmp_path}/cache --name mesh" in text
    assert f"ReadWritePaths={tmp_path}/mesh {tmp_path}/cache" in text
    assert "/not/seen" not in text
    assert "TimeoutStopSec=25" in text


def test_without_systemd_it_says_so_and_can_still_print_the_unit(
    meshd: Meshd, tmp_path: Path, unit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = meshd("service", "install")
    assert outcome.returncode == 1
    assert "has no systemd" in outcome.stderr
    assert not unit.exists()
    assert "[Service]" in meshd("service", "install", "--print").stdout


def test_status_is_a_row_and_an_exit_status(meshd: Meshd, systemctl: Systemctl, unit: Path) -> None:
    outcome = meshd("service", "status")
    assert outcome.returncode == 1
    assert "no service is installed" in outcome.stdout
    meshd("service", "install")
    systemctl.shows(RUNS)
    outcome = meshd("service", "status", "--json")
    assert outcome.returncode == 0
    assert json.loads(outcome.stdout) == {
        "installed": True, "path": str(unit), "scope": "user", "running": True, "enabled": "enabled",
        "state": "active (running)", "pid": 77, "restarts": 2, "result": "success", "says": "up as attic",
    }  # fmt: skip


def test_remove_leaves_nothing_behind(meshd: Meshd, systemctl: Systemctl, unit: Path) -> None:
    assert "no service is installed" in meshd("service", "remove").stdout
    meshd("service", "install")
    systemctl.calls()
    assert meshd("service", "remove").returncode == 0
    assert systemctl.calls() == ["--user disable --now meshd.service", "--user daemon-reload", "--user reset-failed meshd.service"]
    assert not unit.exists()


def test_a_system_service_needs_a_user_and_uses_that_users_folders(meshd: Meshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUDO_USER", raising=False)
    assert "--user NAME" in meshd("service", "install", "--system", "--print").stderr
    assert "no user nobody-here" in meshd("service", "install", "--system", "--user", "nobody-here", "--print").stderr
    text = meshd("service", "install", "--system", "--user", "root", "--print", "--", "--name", "attic").stdout
    home = Path("~root").expanduser()
    assert f"--name attic --state {home}/.local/state/meshd --cache {home}/.cache/meshd" in text
    assert f"ReadWritePaths={home}/.local/state/meshd {home}/.cache/meshd" in text
