"""`meshd top` as a command."""

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

Meshd = Callable[..., CompletedProcess[str]]


def test_off_a_terminal_one_line_points_to_status_watch(meshd: Meshd) -> None:
    outcome = meshd("top", "--api", "http://127.0.0.1:1")
    assert outcome.returncode == 1
    assert outcome.stdout == ""
    (line,) = outcome.stderr.splitlines()
    assert "meshd status --watch" in line


def test_help_and_wrong_options_do_not_load_textual() -> None:
    command = [sys.executable, "-P", "-X", "importtime", "-m", "meshd", "top", "--help"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "textual" not in outcome.stderr
    assert "aiohttp" not in outcome.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="sizes of a terminal are set as on Linux")
def test_on_a_terminal_it_draws_at_once_and_q_ends_it(tmp_path: Path) -> None:
    terminal, side = pty.openpty()
    command = [sys.executable, "-P", "-m", "meshd", "top", "--api", "http://127.0.0.1:1", "--state", str(tmp_path)]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=environment, start_new_session=True)
    os.close(side)
    drawn = b""
    pressed = False
    try:
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    drawn += os.read(terminal, 1 << 16)
                except OSError:
                    break  # the process has closed its side
            if b"not connected" in drawn and not pressed:
                os.write(terminal, b"q")
                pressed = True
        assert process.wait(10) == 0
    finally:
        process.kill()
        os.close(terminal)
    assert b"Cluster" in drawn
    assert b"127.0.0.1:1" in drawn


def test_a_wrong_option_is_wrong_usage(meshd: Meshd) -> None:
    assert meshd("top", "--port", "1").returncode == 2
