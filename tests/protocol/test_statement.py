"""Signed statements: who can make one, and for what."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from meshd.errors import PeerRefused
from meshd.protocol.identity import ClusterKey, Identity, load_identity
from meshd.protocol.statement import StatementChecker, make_statement, read_statement
from meshd.state import StateFolder

CLUSTER = ClusterKey(bytes(range(32)))
BODY = b'{"a":1}'


@pytest.fixture
def one(tmp_path: Path) -> Identity:
    return load_identity(StateFolder.open(tmp_path / "one"), CLUSTER, os.urandom)


@pytest.fixture
def two(tmp_path: Path) -> Identity:
    return load_identity(StateFolder.open(tmp_path / "two"), CLUSTER, os.urandom)


@pytest.fixture
def checker(two: Identity) -> StatementChecker:
    return StatementChecker(lambda: two)


def test_a_statement_says_who_made_it(one: Identity, checker: StatementChecker) -> None:
    statement = read_statement(make_statement(one, "presence", BODY))
    checker.check("presence", statement)
    checker.check("presence", statement)
    assert (statement.peer, statement.body) == (one.peer, BODY)


def test_a_statement_of_one_kind_is_none_of_another(one: Identity, checker: StatementChecker) -> None:
    with pytest.raises(PeerRefused, match="signature"):
        checker.check("order", read_statement(make_statement(one, "presence", BODY)))


def test_a_statement_with_another_body_or_certificate_is_refused(one: Identity, two: Identity, checker: StatementChecker) -> None:
    body, certificate, signature = make_statement(one, "presence", BODY).split(b"\n")
    other = make_statement(two, "presence", BODY).split(b"\n")[1]
    for forged in ((body + b" ", certificate, signature), (body, other, signature)):
        with pytest.raises(PeerRefused, match="signature"):
            checker.check("presence", read_statement(b"\n".join(forged)))


def test_a_statement_of_another_cluster_is_refused(one: Identity, tmp_path: Path, checker: StatementChecker) -> None:
    stranger = load_identity(StateFolder.open(tmp_path / "stranger"), ClusterKey(bytes(32)), os.urandom)
    with pytest.raises(PeerRefused, match="not of this cluster"):
        checker.check("presence", read_statement(make_statement(stranger, "presence", BODY)))
    with pytest.raises(PeerRefused, match="not of this cluster"):
        checker.check("presence", read_statement(make_statement(replace(one, certificate=stranger.certificate), "x", BODY)))


def test_a_statement_under_another_authority_counts_if_its_peer_belongs_to_the_cluster(one: Identity, two: Identity) -> None:
    later = replace(two, key=ClusterKey(bytes(32), CLUSTER.owner, generation=1))
    statement = read_statement(make_statement(one, "presence", BODY))
    StatementChecker(lambda: later, belongs=lambda peer: peer == one.peer).check("presence", statement)
    with pytest.raises(PeerRefused, match="not of this cluster"):
        StatementChecker(lambda: later, belongs=lambda peer: peer == two.peer).check("presence", statement)


def test_what_was_good_under_an_earlier_authority_is_checked_again(one: Identity, two: Identity) -> None:
    present = [two]
    checker = StatementChecker(lambda: present[-1])
    statement = read_statement(make_statement(one, "presence", BODY))
    checker.check("presence", statement)
    present.append(replace(two, key=ClusterKey(bytes(32), CLUSTER.owner, generation=1)))
    with pytest.raises(PeerRefused, match="not of this cluster"):
        checker.check("presence", statement)


@pytest.mark.parametrize("data", [b"", b"a\nb", b"a\nb\nc\nd", b"a\n!!\n", b"a\n\xff\xff\n", b"a\nAAAA\nAAAA", b"{}\n\n"])
def test_a_malformed_statement_is_refused(data: bytes) -> None:
    with pytest.raises(PeerRefused):
        read_statement(data)


def test_a_short_signature_is_refused(one: Identity) -> None:
    body, certificate, _ = make_statement(one, "presence", BODY).split(b"\n")
    with pytest.raises(PeerRefused, match="Ed25519"):
        read_statement(b"\n".join((body, certificate, b"AAAA")))
