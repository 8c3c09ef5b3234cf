"""A device joins by a short code on a real network: it finds the open invite by mDNS. `pytest -s` prints the time."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meshd.config import Settings

pytestmark = pytest.mark.netlab


def meshd(lab: Any, host: str, root: Path, log: str, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "meshd", *words, "--state", str(root / host), "--config", os.devnull]
    with (root / log).open("wb") as output:
        process: subprocess.Popen[bytes] = lab.popen(host, command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    return process


def up(lab: Any, host: str, root: Path, *flags: str) -> subprocess.Popen[bytes]:
    options = ("--threads", "1", "--backend", "onnxruntime", "--cache", str(Settings()["cache"].value))
    return meshd(lab, host, root, f"{host}.log", "up", "--name", host, *options, *flags)


def wait_for(condition: Callable[[], bool], what: str, root: Path, within_s: float = 40.0) -> None:
    until = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > until:
            pytest.fail(f"gave up waiting for {what}:\n" + "\n".join(log.read_text()[-2000:] for log in root.glob("*.log")))
        time.sleep(0.02)


def test_a_device_finds_the_invite_by_mdns_and_joins(netlab: Any, tmp_path: Path) -> None:
    with netlab.Lab(hosts=2) as lab:
        first, second, said = tmp_path / "h1.log", tmp_path / "h2.log", tmp_path / "invite.log"
        up(lab, "h1", tmp_path)
        wait_for(lambda: "up: links on" in first.read_text(), "h1 to be up", tmp_path)
        inviting = meshd(lab, "h1", tmp_path, "invite.log", "invite")
        wait_for(lambda: "\n" in said.read_text(), "the code", tmp_path)
        code = said.read_text().splitlines()[0]
        began = time.monotonic()
        up(lab, "h2", tmp_path, "--join", code)
        assert inviting.wait(40) == 0, said.read_text()
        joined_s = time.monotonic() - began
        assert "joined: h2" in said.read_text()
        wait_for(lambda: "peer h2" in first.read_text() and "is alive" in first.read_text(), "h2 to be a member", tmp_path)
        print(f"\njoined {joined_s:.1f} s after `meshd up --join` was started, with Python's start")
        assert "joined the cluster of h1" in second.read_text()
        assert (tmp_path / "h1" / "cluster.key").read_text() == (tmp_path / "h2" / "cluster.key").read_text()
