"""How the check of one peer is judged, and which of the daemon's notices are repeated."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from meshd.agents.admin.reach import PeerReach
from meshd.agents.cluster_service import CheckResult
from meshd.doctor.check import Context, LivePeer
from meshd.doctor.cluster import judge, notices, peers
from meshd.protocol.messages import DialAttempt
from meshd.types import PeerId

OWN, OTHER = PeerId("a" * 52), PeerId("b" * 52)
LIVE = cast("LivePeer", SimpleNamespace(link="0.0.0.0:6375"))
GOOD = PeerReach(
    peer=OTHER,
    name="desk",
    there=(DialAttempt(address="10.0.0.7:6375"),),
    back=(DialAttempt(address="10.0.0.1:6375"),),
    heard_here=True,
    heard_there=True,
    ahead_s=0.1,
)
CLOSED = (DialAttempt(address="10.0.0.1:6375", why="no answer in time"),)


def _faults(reached: PeerReach) -> dict[str, CheckResult]:
    return {result.check: result for result in judge(reached, LIVE) if result.status.value != "ok"}


def test_a_peer_that_is_reached_both_ways_is_ok() -> None:
    assert _faults(GOOD) == {}
    assert len(judge(GOOD, LIVE)) == 4


@pytest.mark.parametrize(
    ("change", "check", "status", "mend"),
    [
        ({"back": CLOSED}, "peer-dials-back", "wrong", "sudo ufw allow 6375/tcp"),
        ({"back": ()}, "peer-dials-back", "unchecked", "--peer THIS_DEVICE:6375"),
        ({"there": (DialAttempt(address="10.0.0.7:7000", why="refused"),)}, "peer-reach", "warning", "open TCP port 7000"),
        ({"heard_here": False}, "peer-multicast", "warning", "5353/udp"),
        ({"ahead_s": 86400.0}, "peer-clock", "wrong", "timedatectl"),
        ({"ahead_s": -20.0}, "peer-clock", "warning", "timedatectl"),
        ({"back": None, "error": "message 110 is not handled here"}, "peer-reach", "unchecked", "same version"),
    ],
)  # fmt: skip
def test_each_fault_between_two_peers_has_its_mend(change: dict[str, Any], check: str, status: str, mend: str) -> None:
    faults = _faults(replace(GOOD, **change))
    assert list(faults) == [check]
    assert faults[check].status.value == status
    assert mend in faults[check].mend
    assert faults[check].subject == "desk"


def test_one_open_address_of_several_is_enough() -> None:
    assert _faults(replace(GOOD, back=(*CLOSED, DialAttempt(address="192.168.1.7:6375")))) == {}


def _row(name: str, trouble: str = "", state: str = "alive") -> dict[str, Any]:
    return {"id": name, "name": name, "state": state, "trouble": trouble, "reason": f"{trouble} of {name}", "hint": "do this"}


def _with(context: Context, rows: list[dict[str, Any]], told: list[tuple[str, str]]) -> Context:
    return replace(context, peer=cast("Any", SimpleNamespace(id=OWN, rows=lambda: rows, notices=lambda: told)))


async def test_peers_that_are_left_out_are_told_with_the_reason_of_their_row(context: Context) -> None:
    rows = [_row(OWN), _row("desk"), _row("attic", "refused", "refused"), _row("den", "version")]
    results = list(await peers(_with(context, rows, [])))
    assert [(each.check, each.status.value, each.subject) for each in results] == [
        ("peers", "ok", ""),
        ("peer-refused", "wrong", "attic"),
        ("peer-version", "warning", "den"),
    ]
    assert all(each.mend == "do this" for each in results[1:])


async def test_a_lone_peer_is_told_how_another_one_joins(context: Context) -> None:
    [result] = await peers(_with(context, [_row(OWN)], []))
    assert result.status.value == "warning"
    assert "meshd up --key CODE" in result.mend


def test_a_notice_is_repeated_unless_a_row_says_the_same(context: Context) -> None:
    rows = [_row("attic", "refused", "refused")]
    told = [
        ("10.0.0.7: refused of attic", "x"),
        ("a model is too large", "remove it"),
        ("another cluster is on this network: b", "x"),
    ]
    [result] = notices(_with(context, rows, told))
    assert (result.found, result.mend) == ("a model is too large", "remove it")
