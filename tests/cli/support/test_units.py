"""What is written for systemd and launchd. `systemd-analyze verify` reads the units as systemd does."""

import os
import plistlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from meshd.cli.support.units import NAME, Service, command_of, launchd_plist, quoted, systemd_unit

AWKWARD = ("--name", "attic", "--model", "hf:org/name@main:Q4_K_M", "--cache", "/srv/a folder/100%/$HOME", "--origin", 'a"b\\c')


def service(tmp_path: Path, *settings: str, user: str | None = None) -> Service:
    writable = (tmp_path / "a folder", tmp_path / "cache")
    return Service(command=command_of(sys.executable, settings), drain_s=30.0, writable=writable, user=user, log=tmp_path / "log")


def verify(tmp_path: Path, text: str, *, user: bool) -> str:
    """Have systemd read a unit. Returns: its complaints."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    path = tmp_path / NAME
    path.write_text(text)
    words = ["systemd-analyze", *(["--user"] if user else []), "--man=no", "verify", str(path)]
    env = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=env)
    lines = [line for line in done.stderr.splitlines() if NAME in line]
    return "\n".join(lines) or (done.stderr if done.returncode else "")


@pytest.mark.parametrize("user", [None, "root"])
def test_systemd_accepts_the_unit(tmp_path: Path, user: str | None) -> None:
    text = systemd_unit(service(tmp_path, *AWKWARD, user=user))
    assert verify(tmp_path, text, user=user is None) == ""


def test_systemd_would_complain_about_a_wrong_line(tmp_path: Path) -> None:
    text = systemd_unit(service(tmp_path)).replace("Restart=on-failure", "Restart=sometimes")
    assert "sometimes" in verify(tmp_path, text, user=True)


def test_the_unit_waits_for_readiness_watches_and_gives_the_drain_its_time(tmp_path: Path) -> None:
    lines = systemd_unit(service(tmp_path, "--name", "attic")).splitlines()
    assert {"Type=notify", "WatchdogSec=60", "Restart=on-failure", "RestartPreventExitStatus=2", "TimeoutStopSec=45"} <= set(lines)
    assert f"ExecStart={sys.executable} -P -m meshd up --name attic" in lines
    assert "WantedBy=default.target" in lines
    assert not any(line.startswith(("User=", "ProtectSystem=")) for line in lines)


def test_a_system_unit_runs_as_its_user_and_writes_only_to_its_folders(tmp_path: Path) -> None:
    lines = systemd_unit(service(tmp_path, user="ada")).splitlines()
    assert {"User=ada", "ProtectSystem=strict", "CapabilityBoundingSet=", "WantedBy=multi-user.target"} <= set(lines)
    assert f'ReadWritePaths="{tmp_path}/a folder" {tmp_path}/cache' in lines


@pytest.mark.parametrize("word", [*AWKWARD, "", "#", "a;b", "'", "\t", "ü"])
def test_a_word_is_quoted_so_that_systemd_reads_it_again(word: str) -> None:
    once = quoted(word).replace("%%", "%").replace("$$", "$")
    assert shlex.split(once) == [word]


def test_launchd_gets_a_property_list_that_starts_the_daemon_and_again_after_a_failure(tmp_path: Path) -> None:
    read = plistlib.loads(launchd_plist(service(tmp_path, "--name", "attic")))
    assert read["ProgramArguments"] == [
        sys.executable, "-P", "-m", "meshd", "up", "--name", "attic", "--log-file", str(tmp_path / "log"),
    ]  # fmt: skip
    assert read["KeepAlive"] == {"SuccessfulExit": False}
    assert (read["RunAtLoad"], read["ExitTimeOut"]) == (True, 45)
    assert "UserName" not in read
    assert plistlib.loads(launchd_plist(service(tmp_path, user="ada")))["UserName"] == "ada"
