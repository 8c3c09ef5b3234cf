from typing import Any

import msgspec
import pytest

from in_process.peer_events import ANN, BOB, HOME, PROFILE_CAME, PROFILE_HASH, found, link_up, status
from meshd.agents.membership.peer_events import (
    DialFailed,
    Event,
    HandshakeRefused,
    HeartbeatMissed,
    LinkDown,
    LinkUp,
    PeerState,
    StatusReceived,
)
from meshd.agents.membership.peer_rows import cluster_rows, unlinked_row
from meshd.agents.membership.peer_table import PeerTable
from meshd.types import Status
from meshd.values import Address


def test_all_rows_are_json_with_the_same_keys() -> None:
    table = PeerTable()
    table.apply(link_up(), 1.0)
    table.apply(status(), 2.0)
    table.apply(PROFILE_CAME, 2.0)
    table.apply(found(BOB), 3.0)
    table.apply(found(None, "attic.lan", source="static"), 3.0)
    rows = table.rows(5.0)
    assert [row["peer"] for row in msgspec.json.decode(msgspec.json.encode(rows))] == [ANN, BOB, ""]
    assert len({tuple(row) for row in rows}) == 1
    assert [row["state"] for row in rows] == ["alive", "found", "found"]
    assert rows[0]["capability"]["rates"]["decode_bytes_s"] == 1e9
    assert (rows[0]["last_seen_s"], rows[1]["last_seen_s"]) == (3.0, 2.0)


def test_a_peer_that_was_never_linked_shows_its_address_and_why() -> None:
    row = unlinked_row(Address("attic.lan", 6375), "link", PeerState.REFUSED, "another key", "ann")
    assert (row["peer"], row["name"], row["state"], row["why"]) == ("ann", "attic.lan:6375", "refused", "another key")
    assert row["addresses"] == [{"host": "attic.lan", "port": 6375, "source": "link"}]


def _late(seconds: float) -> StatusReceived:
    return StatusReceived(ANN, Status(revision=1, profile=PROFILE_HASH, memory_free_bytes=3), seconds)


def _of_version(version: str, protocol: str) -> LinkUp:
    return LinkUp(ANN, 1, "desk", version, None, protocol)


@pytest.mark.parametrize(
    ("events", "state", "kind", "said", "hint"),
    [
        (
            [found(), DialFailed(ANN, HOME, "no route to host", "join one network")],
            "not reached",
            "unreachable",
            "no route",
            "one network",
        ),
        ([found(), DialFailed(ANN, HOME, "no route to host")], "not reached", "unreachable", "no route", "meshd doctor"),
        (
            [found(), HandshakeRefused(ANN, HOME, "another key", "", "meshd up --key CODE")],
            "refused",
            "refused",
            "another key",
            "--key CODE",
        ),
        ([link_up(), LinkDown(ANN, "connection reset")], "dead", "lost", "connection reset", "meshd doctor"),
        ([link_up(), HeartbeatMissed(ANN)], "suspect", "silent", "silent", "meshd doctor"),
        ([_of_version("0.1.0", "3.1"), _late(86400.0)], "alive", "clock", "24 h ahead of", "timedatectl"),
        ([_of_version("0.1.0", "3.1"), _late(-86400.0)], "alive", "clock", "24 h behind", "timedatectl"),
        ([_of_version("0.1.0", "3.1"), _late(20.0)], "alive", "", "", ""),
        ([_of_version("0.0.9", "3.1")], "alive", "version", "meshd 0.0.9 (protocol 3.1), this peer 0.1.0 (3.1)", "same version"),
        ([_of_version("0.1.0", "3.0")], "alive", "version", "protocol 3.0", "same version"),
        ([found()], "found", "", "", ""),
    ],
)
def test_each_trouble_of_a_peer_has_its_reason_and_what_to_do(
    events: list[Event], state: str, kind: str, said: str, hint: str
) -> None:
    table = PeerTable()
    for event in events:
        table.apply(event, 1.0)
    [row] = table.rows(1.0, "0.1.0", "3.1")
    assert (row["state"], row["trouble"]) == (state, kind)
    assert said in row["why"]
    assert hint in row["hint"]


def test_a_trouble_is_over_when_the_peer_is_well_again() -> None:
    table = PeerTable()
    table.apply(found(), 1.0)
    table.apply(DialFailed(ANN, HOME, "no route to host", "join one network"), 1.0)
    table.apply(_of_version("0.1.0", "3.1"), 2.0)
    [row] = table.rows(2.0, "0.1.0", "3.1")
    assert (row["trouble"], row["why"], row["hint"]) == ("", "", "")


def test_another_cluster_is_a_row_with_the_command_that_joins_it() -> None:
    rows: list[dict[str, Any]] = cluster_rows({"b" * 16: 2}, {"b" * 16: HOME})
    assert [(row["name"], row["state"], row["trouble"]) for row in rows] == [("b" * 16, "other cluster", "other cluster")]
    assert rows[0]["addresses"] == [{"host": HOME.host, "port": HOME.port, "source": "mdns"}]
    assert "2 peers" in rows[0]["why"]
    assert "meshd key join CODE --replace" in rows[0]["hint"]
