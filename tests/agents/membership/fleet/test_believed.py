"""Which presences are believed."""

import os
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest

from meshd.agents.membership.fleet import believed
from meshd.agents.membership.fleet.believed import MAX_AGE_S, SILENT_S, BelievedPresences, Refused
from meshd.agents.membership.fleet.presence import Presence, sign_presence
from meshd.protocol.identity import Identity
from meshd.protocol.statement import StatementChecker
from meshd.types import PeerId
from mqtt.forgeries import Forger

NOW = 1_800_000_000.0
MakeIdentity = Callable[[str], Identity]


def presence(identity: Identity, *, at: float = NOW, since: float = NOW, **fields: object) -> Presence:
    return Presence(
        cluster=identity.fingerprint,
        peer=identity.peer,
        name="one",
        at=int(1000 * at),
        since=int(1000 * since),
        **{"addresses": ("10.0.0.7",), "port": 6375, **fields},  # type: ignore[arg-type]
    )


class Ear:
    """Hears presences at a time that the test sets."""

    def __init__(self, identity: Identity) -> None:
        self.table = BelievedPresences(identity.fingerprint, StatementChecker(lambda: identity))
        self.now = 0.0

    def hear(self, identity: Identity, said: Presence, peer: PeerId | None = None) -> Presence | Refused:
        return self.hear_bytes(peer or identity.peer, sign_presence(identity, said))

    def hear_bytes(self, peer: PeerId, data: bytes) -> Presence | Refused:
        return self.table.hear(peer, data, NOW + self.now, self.now)


@pytest.fixture
def ear(identity: Identity) -> Ear:
    return Ear(identity)


def test_the_presence_of_a_member_is_believed(ear: Ear, make_identity: MakeIdentity) -> None:
    other = make_identity("other")
    said = presence(other, unreached=(other.peer,))
    assert ear.hear(other, said) == said
    assert ear.table.get(other.peer) == said


def test_a_presence_of_another_cluster_is_not_believed(ear: Ear, identity: Identity, stranger: Identity) -> None:
    said = msgspec.structs.replace(presence(stranger), cluster=identity.fingerprint)
    assert ear.hear(stranger, said) == Refused("forged")
    assert ear.hear(stranger, presence(stranger)) == Refused("elsewhere")


def test_a_member_can_not_speak_for_another_one(ear: Ear, identity: Identity, make_identity: MakeIdentity) -> None:
    other = make_identity("other")
    forged = sign_presence(replace(identity, certificate=other.certificate), presence(other))
    assert ear.hear_bytes(other.peer, forged) == Refused("forged")
    assert ear.hear(identity, presence(other), other.peer) == Refused("malformed")
    assert ear.hear(identity, presence(identity), other.peer) == Refused("elsewhere")


def test_a_repeated_or_earlier_presence_is_refused_without_a_check_of_signatures(ear: Ear, identity: Identity) -> None:
    first, second = presence(identity), presence(identity, at=NOW + 1)
    assert ear.hear(identity, second) == second
    assert ear.hear(identity, second) == Refused("repeated")
    assert ear.hear(identity, first) == Refused("repeated")


@pytest.mark.parametrize(("off_s", "reason"), [(-MAX_AGE_S - 1, Refused("old")), (MAX_AGE_S + 1, Refused("future", clock=True))])
def test_a_presence_of_another_time_is_refused(ear: Ear, identity: Identity, off_s: float, reason: Refused) -> None:
    assert ear.hear(identity, presence(identity, at=NOW + off_s)) == reason
    assert ear.table.get(identity.peer) is None


def test_only_a_member_can_cause_a_notice_about_clocks(ear: Ear, identity: Identity, stranger: Identity) -> None:
    said = msgspec.structs.replace(presence(stranger, at=NOW + 1e6), cluster=identity.fingerprint)
    assert ear.hear(stranger, said) == Refused("forged")


def test_a_last_will_ends_its_own_connection_only(ear: Ear, identity: Identity) -> None:
    will = presence(identity, at=NOW - 5000, since=NOW - 5000, leaves=True)
    latest = presence(identity, at=NOW, since=NOW - 5000)
    assert ear.hear(identity, latest) == latest
    assert ear.hear(identity, will) == will
    back = presence(identity, at=NOW + 2, since=NOW + 1)
    assert ear.hear(identity, back) == back
    assert ear.hear(identity, will) == Refused("repeated")
    assert ear.table.get(identity.peer) == back


def test_forgeries_of_one_peer_cost_few_checks_and_do_not_delay_another(
    ear: Ear, identity: Identity, make_identity: MakeIdentity
) -> None:
    other = make_identity("other")
    ear.hear(identity, presence(identity))
    ear.hear(other, presence(other))
    for number in range(1000):
        forged = sign_presence(replace(other, certificate=identity.certificate), presence(identity, at=NOW + 1 + number / 1000))
        ear.hear_bytes(identity.peer, forged)
    assert ear.table.refused["forged"] < 10
    assert ear.table.refused["too many"] > 980
    newer = presence(other, at=NOW + 1)
    assert ear.hear(other, newer) == newer
    ear.now = 5.0
    newer = presence(identity, at=NOW + 3)
    assert ear.hear(identity, newer) == newer


def test_the_table_is_bounded(ear: Ear, make_identity: MakeIdentity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(believed, "MAX_PEERS", 8)
    for number in range(12):
        ear.now += 1
        other = make_identity(f"peer{number}")
        ear.hear(other, presence(other, at=NOW + ear.now))
    assert len(ear.table) == 8


def test_nothing_that_is_forged_is_believed(ear: Ear, identity: Identity, make_identity: MakeIdentity) -> None:
    members = [identity, make_identity("two"), make_identity("three")]
    real = {f"meshd/1/{one.fingerprint}/peer/{one.peer}/presence": sign_presence(one, presence(one)) for one in members}
    for one in members:
        ear.hear(one, presence(one))
    for topic, payload in Forger(real, "192.0.2.1", 9, seed=int.from_bytes(os.urandom(2), "big")).make(2000):
        ear.now += 0.01
        heard = ear.hear_bytes(PeerId(topic.split("/")[4]), payload)
        assert isinstance(heard, Refused)
    assert {"repeated", "forged", "malformed", "elsewhere"} <= set(ear.table.refused)
    assert len(ear.table) == 3


def test_a_presence_that_is_not_repeated_is_forgotten_and_no_copy_of_it_is_believed(ear: Ear, make_identity: MakeIdentity) -> None:
    gone, left, stays = (make_identity(name) for name in ("gone", "left", "stays"))
    newest = sign_presence(gone, presence(gone, at=NOW + MAX_AGE_S))
    assert isinstance(ear.hear_bytes(gone.peer, newest), Presence)
    assert isinstance(ear.hear(left, presence(left, leaves=True)), Presence)
    ear.now = SILENT_S + 1
    assert isinstance(ear.hear(stays, presence(stays, at=NOW + ear.now)), Presence)
    assert ear.table.forget_silent(ear.now - SILENT_S) == [gone.peer]
    assert [known.peer for known in ear.table.present()] == [stays.peer]
    assert len(ear.table) == 1
    assert ear.hear_bytes(gone.peer, newest) == Refused("old")
