import json
import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from meshd.state import lock_state

Meshd = Callable[..., CompletedProcess[str]]


def test_there_is_no_key_at_first(meshd: Meshd) -> None:
    outcome = meshd("key", "show")
    assert outcome.returncode == 1
    assert "there is no cluster key" in outcome.stderr
    assert "meshd key join CODE" in outcome.stderr


def test_a_new_key_is_shown_as_a_join_code(meshd: Meshd) -> None:
    code = meshd("key", "new").stdout.strip()
    shown = meshd("key", "show")
    assert shown.stdout.strip() == code
    assert f"meshd up --key {code}" in shown.stderr
    assert json.loads(meshd("key", "show", "--json").stdout) == {"code": code}


def test_joining_stores_the_other_devices_key(meshd: Meshd, tmp_path: Path) -> None:
    code = meshd("key", "new").stdout.strip()
    other = str(tmp_path / "other")
    assert meshd("key", "join", code.lower().replace("-", " "), "--state", other).returncode == 0
    assert meshd("key", "show", "--state", other).stdout.strip() == code


def test_a_key_is_replaced_only_on_request(meshd: Meshd) -> None:
    first = meshd("key", "new").stdout
    refused = meshd("key", "new")
    assert refused.returncode == 1
    assert "--replace" in refused.stderr
    assert meshd("key", "show").stdout == first
    assert meshd("key", "join", first.strip()).returncode == 0
    assert meshd("key", "new", "--replace").stdout not in {"", first}


def test_a_mistyped_code_is_wrong_usage_and_changes_nothing(meshd: Meshd) -> None:
    code = meshd("key", "new").stdout.strip()
    assert meshd("key", "join", code[:-1] + ("0" if code[-1] != "0" else "1"), "--replace").returncode == 2
    assert meshd("key", "show").stdout.strip() == code


def test_a_running_daemon_is_mentioned(meshd: Meshd, tmp_path: Path) -> None:
    meshd("key", "new")
    with lock_state(tmp_path / "state", api="127.0.0.1:1"):
        assert f"process {os.getpid()}" in meshd("key", "new", "--replace").stderr


def test_the_api_key_stays_until_a_new_one_is_requested(meshd: Meshd, tmp_path: Path) -> None:
    key = meshd("key", "api").stdout.strip()
    assert len(bytes.fromhex(key)) == 24  # it never begins with "-", which `--api-key KEY` would take for a flag
    assert json.loads(meshd("key", "api", "--json").stdout) == {"api_key": key}
    assert meshd("key", "api", "--new").stdout.strip() != key
    assert (tmp_path / "state" / "api.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("words", [("key",), ("key", "lose")])
def test_key_needs_a_known_command(meshd: Meshd, words: tuple[str, ...]) -> None:
    outcome = meshd(*words)
    assert outcome.returncode == 2
    assert "see `meshd key --help`" in outcome.stderr
