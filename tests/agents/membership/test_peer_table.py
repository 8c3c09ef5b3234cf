"""The table of peers: static addresses, expiry, its bound, and any events in any order."""

from copy import copy

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from in_process.peer_events import (
    ANN,
    AWAY,
    BOB,
    EVENTS_TO,
    HOME,
    PROFILE,
    PROFILE_CAME,
    PROFILE_HASH,
    advert,
    found,
    link_up,
    status,
)
from meshd.agents.machine import IllegalTransition
from meshd.agents.membership.peer import RETENTION_S
from meshd.agents.membership.peer_events import (
    LINKED,
    Command,
    Dial,
    DialFailed,
    Event,
    GoodbyeReceived,
    HandshakeRefused,
    HeartbeatMissed,
    HeartbeatReceived,
    LinkDown,
    PeerState,
    ProfileReceived,
    PublishChange,
    RetentionExpired,
    StopDialling,
)
from meshd.agents.membership.peer_table import MAX_UNLINKED, PeerTable
from meshd.agents.membership.sources import PeerWithdrawn
from meshd.errors import Overloaded
from meshd.types import PeerId
from meshd.values import Address


def table_at(state: PeerState) -> PeerTable:
    table = PeerTable()
    for event in EVENTS_TO[state]:
        table.apply(event, 1.0)
    return table


def state_of(table: PeerTable, peer: PeerId = ANN) -> PeerState:
    known = table.get(peer)
    return known.state if known is not None else PeerState.UNKNOWN


def commands_of(commands: list[Command], kind: type) -> list[Command]:
    return [command for command in commands if isinstance(command, kind)]


def test_an_illegal_event_changes_nothing() -> None:
    table = PeerTable()
    with pytest.raises(IllegalTransition, match="LinkDown in state unknown"):
        table.apply(LinkDown(ANN, "connection reset"), 1.0)
    assert len(table) == 0


def test_a_failed_dial_or_a_withdrawal_adds_no_unknown_peer() -> None:
    table = PeerTable()
    assert table.apply(DialFailed(ANN, HOME, "connection refused"), 1.0) == []
    assert table.apply(PeerWithdrawn(source="mdns", peer=ANN), 1.0) == []
    assert len(table) == 0


def test_plans_leave_out_suspects() -> None:
    table = table_at(PeerState.ALIVE)
    table.apply(status(), 2.0)
    table.apply(PROFILE_CAME, 2.0)
    assert table.adverts() == [advert()]
    table.apply(HeartbeatMissed(ANN), 3.0)
    assert table.adverts() == []
    assert [peer.id for peer in table.linked()] == [ANN]


def test_a_static_address_is_dialled_until_a_peer_answers_there() -> None:
    table, static = PeerTable(), found(None, "attic.lan", source="static")
    attic = Address("attic.lan", 6375)
    assert table.apply(static, 1.0) == [Dial(None, (attic,))]
    table.apply(DialFailed(None, attic, "name not known"), 1.5)
    assert [(row["peer"], row["name"], row["why"]) for row in table.rows(2.0)] == [("", "attic.lan:6375", "name not known")]
    table.apply(link_up(BOB, dialled=attic), 2.0)
    assert table.apply(static, 3.0) == []
    assert [row["peer"] for row in table.rows(3.0)] == [BOB]
    table.apply(LinkDown(BOB, "connection reset"), 4.0)
    assert table.apply(static, 5.0) == [Dial(BOB, (attic,))]


def test_the_row_of_a_static_address_says_why_no_peer_answers() -> None:
    table, attic = PeerTable(), Address("attic.lan", 6375)
    table.apply(found(None, attic.host, source="static"), 1.0)
    rows = lambda: [(row["state"], row["why"]) for row in table.rows(3.0)]  # noqa: E731
    assert rows() == [("found", "being dialled")]
    table.apply(DialFailed(None, attic, "its name is not known"), 2.0)
    assert rows() == [("not reached", "its name is not known")]
    table.apply(HandshakeRefused(None, attic, "another cluster's key"), 2.0)
    assert rows() == [("refused", "another cluster's key")]
    table.answered(attic, BOB)
    assert rows() == []


def test_many_reports_of_peers_that_were_never_linked_do_not_displace_those_that_were() -> None:
    table = PeerTable()
    table.apply(link_up(BOB), 1.0)
    table.apply(LinkDown(BOB, "gone"), 1.0)
    for number in range(5000):
        table.apply(found(PeerId(f"forged {number}")), 2.0)
    assert state_of(table, BOB) is PeerState.DEAD
    assert len(table) == MAX_UNLINKED + 1


def test_a_dead_peer_is_dropped_after_its_retention() -> None:
    table = table_at(PeerState.DEAD)
    assert table.expire(RETENTION_S[PeerState.DEAD]) == []
    assert table.expire(RETENTION_S[PeerState.DEAD] + 2.0) == [
        StopDialling(ANN),
        PublishChange(ANN, PeerState.UNKNOWN, PeerState.DEAD, ""),
    ]
    assert len(table) == 0


def test_a_linked_peer_is_never_dropped_and_one_that_never_answered_is() -> None:
    alive, silent = table_at(PeerState.ALIVE), table_at(PeerState.UNREACHED)
    assert alive.expire(1e9) == []
    assert silent.expire(1e9)


def test_a_full_table_drops_the_oldest_dead_and_refuses_when_all_are_linked() -> None:
    table = PeerTable(max_peers=2)
    table.apply(link_up(ANN), 1.0)
    table.apply(LinkDown(ANN, "gone"), 1.0)
    table.apply(link_up(BOB), 2.0)
    commands = table.apply(link_up(PeerId("cat")), 3.0)
    assert StopDialling(ANN) in commands
    with pytest.raises(Overloaded):
        table.apply(link_up(PeerId("dan")), 4.0)
    assert {peer.id for peer in table.linked()} == {BOB, PeerId("cat")}


PEERS = [PeerId(name) for name in ("ann", "bob", "cat", "dan")]
peers = st.sampled_from(PEERS)
incarnations = st.integers(1, 3)


class Membership(RuleBasedStateMachine):
    """Applies random events in any order, as they may come from a network and several sources."""

    def __init__(self) -> None:
        super().__init__()
        self.table = PeerTable(max_peers=3)
        self.now = 0.0
        self.dialling: set[PeerId] = set()

    def take(self, event: Event) -> None:
        self.now += 1.0
        before = {peer: copy(self.table.get(peer)) for peer in PEERS}
        try:
            commands = self.table.apply(event, self.now)
        except (IllegalTransition, Overloaded):
            assert before == {peer: self.table.get(peer) for peer in PEERS}
            return
        for command in commands:
            if isinstance(command, Dial) and command.peer is not None:
                self.dialling.add(command.peer)
            elif isinstance(command, StopDialling):
                self.dialling.discard(command.peer)
            elif isinstance(command, PublishChange):
                assert command.state is state_of(self.table, command.peer)

    @rule(peer=peers, hosts=st.lists(st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3"]), min_size=1, unique=True))
    def a_source_finds(self, peer: PeerId, hosts: list[str]) -> None:
        self.take(found(peer, *hosts))

    @rule(peer=peers, incarnation=incarnations, dialled=st.sampled_from([HOME, AWAY, None]))
    def a_link_comes_up(self, peer: PeerId, incarnation: int, dialled: Address | None) -> None:
        self.take(link_up(peer, incarnation, dialled))

    @rule(peer=peers, revision=st.integers(1, 5), profile=st.sampled_from([PROFILE_HASH, "11" * 16]))
    def a_status_comes(self, peer: PeerId, revision: int, profile: str) -> None:
        self.take(status(peer, revision, profile))

    @rule(peer=peers)
    def a_profile_comes(self, peer: PeerId) -> None:
        self.take(ProfileReceived(peer, PROFILE_HASH, PROFILE))

    @rule(peer=peers, kind=st.sampled_from([HeartbeatReceived, HeartbeatMissed, RetentionExpired]))
    def silence_is_reported(self, peer: PeerId, kind: type[HeartbeatReceived | HeartbeatMissed | RetentionExpired]) -> None:
        self.take(kind(peer))

    @rule(peer=peers, kind=st.sampled_from([LinkDown, GoodbyeReceived]))
    def a_link_ends(self, peer: PeerId, kind: type[LinkDown | GoodbyeReceived]) -> None:
        self.take(kind(peer, "over"))

    @rule(peer=peers, kind=st.sampled_from([DialFailed, HandshakeRefused]))
    def a_dial_fails(self, peer: PeerId, kind: type[DialFailed | HandshakeRefused]) -> None:
        self.take(kind(peer, HOME, "no"))

    @rule(peer=peers)
    def a_source_withdraws(self, peer: PeerId) -> None:
        self.take(PeerWithdrawn(source="mdns", peer=peer))

    @rule(
        event=st.sampled_from(
            [
                found(None, "attic", source="static"),
                DialFailed(None, Address("attic", 6375), "no"),
                HandshakeRefused(None, Address("attic", 6375), "no"),
            ]
        )
    )
    def something_happens_to_an_address(self, event: Event) -> None:
        self.take(event)

    @rule(seconds=st.sampled_from([1.0, 100.0, 1000.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for command in self.table.expire(self.now):
            if isinstance(command, StopDialling):
                self.dialling.discard(command.peer)

    @invariant()
    def the_table_is_valid(self) -> None:
        self.table.validate()
        assert len(self.table) <= 3

    @invariant()
    def adverts_are_of_the_current_incarnation_of_alive_peers(self) -> None:
        for each in self.table.adverts():
            known = self.table.get(each.peer)
            assert known is not None
            assert known.state is PeerState.ALIVE
            assert known.incarnation == each.incarnation

    @invariant()
    def peers_that_left_or_are_forgotten_are_not_dialled(self) -> None:
        assert all(state_of(self.table, peer) not in {PeerState.LEFT, PeerState.UNKNOWN} for peer in self.dialling)

    @invariant()
    def lost_peers_with_an_address_are_dialled(self) -> None:
        for peer in PEERS:
            known = self.table.get(peer)
            if known is not None and known.state in {PeerState.FOUND, PeerState.UNREACHED, PeerState.DEAD} and known.addresses:
                assert known.id in self.dialling

    @invariant()
    def rows_show_everyone(self) -> None:
        rows = self.table.rows(self.now)
        assert len([row for row in rows if row["peer"]]) == len(self.table)
        assert all(row["why"] == "" or row["state"] != "alive" or "copied" in row["why"] for row in rows)

    @invariant()
    def linked_means_alive_or_suspect(self) -> None:
        assert all(peer.state in LINKED for peer in self.table.linked())


TestMembership = Membership.TestCase
TestMembership.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
