"""`meshd key rotate`, `revoke` and `owner add`: what they refuse, and what they show before they ask.

`tests/cluster/test_exclusion.py` runs them against real daemons.
"""

from argparse import Namespace
from collections.abc import Callable
from subprocess import CompletedProcess
from typing import Any

import pytest

from ids import peer_id
from meshd.cli import key_rotation
from meshd.errors import ConfigError, NoPeer, UsageError
from meshd.protocol.trust import MAX_STAYING

Meshd = Callable[..., CompletedProcess[str]]
ME = peer_id("me")


def row(name: str, *, belongs: bool = True, address: str = "192.168.1.5", linked: bool = True) -> dict[str, Any]:
    times = {"first_at": 1_780_000_000.0, "last_at": 1_780_000_100.0}
    known = {"peer": peer_id(name), "name": name, "first_address": address, "last_address": address}
    return known | times | {"belongs": belongs, "linked": linked, "has_key": False}


KNOWN = {
    "self": ME,
    "peers": [
        row("attic"),
        row("barn", address="192.168.1.66"),
        row("stable", address="192.168.1.66", linked=False),
        row("gone", belongs=False),
        {"peer": peer_id("unmet"), "belongs": True, "linked": False, "has_key": False},
    ],
}


@pytest.mark.parametrize("words", [("rotate",), ("revoke", "attic"), ("owner", "add", "attic")])
def test_without_a_cluster_an_owner_key_or_a_daemon_they_say_what_is_missing(meshd: Meshd, words: tuple[str, ...]) -> None:
    assert "there is no cluster key" in meshd("key", *words).stderr
    code = meshd("key", "new").stdout.strip()
    assert "no daemon runs here" in meshd("key", *words).stderr
    meshd("key", "new", "--replace")
    meshd("key", "join", code.replace("mesh-", ""), "--replace")
    assert "no daemon runs here" in meshd("key", *words).stderr, "the owner key of the first cluster is still there"


def test_a_device_that_joined_has_no_owner_key(meshd: Meshd, tmp_path: Any) -> None:
    code = meshd("key", "new").stdout.strip()
    assert "this device has the owner key" in meshd("key", "show").stderr
    other = ("--state", str(tmp_path / "other"))
    assert meshd("key", "join", code, *other).returncode == 0
    assert "does not have the owner key" in meshd("key", "show", *other).stderr
    refused = meshd("key", "rotate", *other)
    assert refused.returncode == 2
    assert "does not have the owner key" in refused.stderr
    assert "meshd key owner add" in refused.stderr


def test_a_peer_is_named_by_its_name_or_the_beginning_of_its_id() -> None:
    for text in ("attic", peer_id("attic")[:12], peer_id("attic")):
        assert key_rotation._resolve(text, KNOWN)["name"] == "attic"
    assert key_rotation._resolve(peer_id("unmet")[:12], KNOWN)["peer"] == peer_id("unmet")
    with pytest.raises(NoPeer, match="no device of the cluster"):
        key_rotation._resolve("gone", KNOWN)
    with pytest.raises(UsageError, match="can't exclude itself"):
        key_rotation._resolve(ME[:12], KNOWN)
    twins = {"self": ME, "peers": [row("attic"), row("attic") | {"peer": peer_id("twin")}]}
    with pytest.raises(UsageError, match="2 devices"):
        key_rotation._resolve("attic", twins)


def test_the_list_shows_who_stays_with_when_and_from_where(capsys: pytest.CaptureFixture[str]) -> None:
    key_rotation._confirm(KNOWN, [KNOWN["peers"][1]], Namespace(yes=True, json=False))  # type: ignore[index, list-item]
    shown = capsys.readouterr().out
    assert "excluded: barn" in shown
    lines = {line.split()[0]: line for line in shown.splitlines() if line}
    assert "192.168.1.5" in lines["attic"]
    assert "2026-" in lines["attic"]
    assert "revoke it too?" not in lines["attic"]
    assert "same address as barn: revoke it too?" in lines["stable"]
    assert "away" in lines["stable"]
    assert "(never" in shown
    assert "gone" not in lines


def test_more_devices_than_a_rotation_can_list_are_named_as_the_reason() -> None:
    known = {"self": ME, "peers": [row(f"{number}") for number in range(MAX_STAYING)]}
    with pytest.raises(ConfigError, match="513 devices would stay; a rotation can list 512"):
        key_rotation._send(Any, known, set(), new_owner=False)  # type: ignore[arg-type]


def test_off_a_terminal_yes_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(ConfigError, match="nobody can be asked"):
        key_rotation._confirm(KNOWN, [], Namespace(yes=False, json=False))


@pytest.mark.parametrize(("answer", "goes_on"), [("y", True), ("yes", True), ("", False), ("n", False), ("maybe", False)])
def test_only_yes_is_yes(monkeypatch: pytest.MonkeyPatch, answer: str, goes_on: bool) -> None:
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("builtins.input", lambda: answer)
    if goes_on:
        key_rotation._confirm(KNOWN, [], Namespace(yes=False, json=False))
    else:
        with pytest.raises(UsageError, match="nothing was changed"):
            key_rotation._confirm(KNOWN, [], Namespace(yes=False, json=False))
