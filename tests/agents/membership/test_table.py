import itertools

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from meshd.agents.machine import IllegalTransition
from meshd.agents.membership.peer_events import (
    LINKED,
    AdvertReceived,
    Command,
    Dial,
    DialFailed,
    Event,
    GoodbyeReceived,
    HandshakeRefused,
    HeartbeatMissed,
    HeartbeatReceived,
    LinkDown,
    LinkUp,
    PeerState,
    PublishChange,
    RetentionExpired,
    StopDialling,
)
from meshd.agents.membership.sources import PeerFound, PeerWithdrawn
from meshd.agents.membership.table import (
    MAX_ADDRESSES,
    REFUSED_RETRY_S,
    RETENTION_S,
    TRANSITIONS,
    PeerTable,
)
from meshd.errors import Overloaded
from meshd.types import Advert, Capability, PeerId, Rates
from meshd.values import Address

ANN, BOB = PeerId("ann"), PeerId("bob")
HOME, AWAY = Address("192.168.1.7", 6375), Address("10.0.0.7", 6375)
RATES = Rates(
    decode_bytes_s=1e9, prefill_flops_s=1e10, memory_bytes_s=1e10, attention_bytes_s=1e9, disk_bytes_s=1e9, layer_overhead_s=1e-4
)
CAPABILITY = Capability(backend="torch", processor="cpu", threads=2, memory_total_bytes=8, memory_free_bytes=4, rates=RATES)


def found(peer: PeerId | None = ANN, *hosts: str, source: str = "mdns", port: int = 6375) -> PeerFound:
    return PeerFound(
        source=source, peer=peer, addresses=hosts or (HOME.host,), port=port, name="desk", version="0.1.0", protocol="1.0"
    )


def advert(peer: PeerId = ANN, incarnation: int = 1, revision: int = 1) -> Advert:
    return Advert(peer=peer, name="desk", incarnation=incarnation, revision=revision, version="0.1.0", capability=CAPABILITY)


def link_up(peer: PeerId = ANN, incarnation: int = 1, dialled: Address | None = None) -> LinkUp:
    return LinkUp(peer, incarnation, "desk", "0.1.0", dialled)


EVENTS: list[Event] = [
    found(),
    PeerWithdrawn(source="mdns", peer=ANN),
    link_up(),
    LinkDown(ANN, "connection reset"),
    DialFailed(ANN, HOME, "connection refused"),
    HandshakeRefused(ANN, HOME, "another key"),
    AdvertReceived(advert()),
    HeartbeatReceived(ANN),
    HeartbeatMissed(ANN),
    GoodbyeReceived(ANN, "stopped"),
    RetentionExpired(ANN),
]
WAY_TO: dict[PeerState | None, list[Event]] = {
    None: [],
    PeerState.FOUND: [found()],
    PeerState.ALIVE: [found(), link_up()],
    PeerState.SUSPECT: [found(), link_up(), HeartbeatMissed(ANN)],
    PeerState.DEAD: [found(), link_up(), LinkDown(ANN, "connection reset")],
    PeerState.REFUSED: [found(), HandshakeRefused(ANN, HOME, "another key")],
    PeerState.LEFT: [found(), link_up(), GoodbyeReceived(ANN, "stopped")],
}


def table_at(state: PeerState | None) -> PeerTable:
    table = PeerTable()
    for event in WAY_TO[state]:
        table.apply(event, 1.0)
    return table


def state_of(table: PeerTable, peer: PeerId = ANN) -> PeerState | None:
    known = table.get(peer)
    return known.state if known is not None else None


def commands_of(commands: list[Command], kind: type) -> list[Command]:
    return [command for command in commands if isinstance(command, kind)]


@pytest.mark.parametrize(
    ("state", "event"), list(itertools.product(WAY_TO, EVENTS)), ids=lambda each: getattr(each, "name", type(each).__name__)
)
def test_every_event_in_every_state_does_what_the_table_says(state: PeerState | None, event: Event) -> None:
    table = table_at(state)
    assert state_of(table) is state
    before = table.get(ANN)
    if type(event) in TRANSITIONS[state]:
        table.apply(event, 2.0)
        assert state_of(table) is TRANSITIONS[state][type(event)]
    else:
        with pytest.raises(IllegalTransition, match=type(event).__name__):
            table.apply(event, 2.0)
        assert table.get(ANN) == before
        assert len(table) == (before is not None)


def test_the_table_speaks_of_every_state_and_event() -> None:
    assert set(TRANSITIONS) == set(WAY_TO) == {None, *PeerState}
    assert {event for following in TRANSITIONS.values() for event in following} == {type(event) for event in EVENTS}


def test_a_peer_that_is_found_is_dialled_at_all_its_addresses() -> None:
    commands = PeerTable().apply(found(ANN, HOME.host, AWAY.host), 1.0)
    assert commands == [Dial(ANN, (HOME, AWAY)), PublishChange(ANN, PeerState.FOUND, None, "")]


def test_a_linked_peer_is_not_dialled_however_often_it_is_heard() -> None:
    assert table_at(PeerState.ALIVE).apply(found(), 2.0) == []


@pytest.mark.parametrize("state", [PeerState.FOUND, PeerState.DEAD, PeerState.REFUSED, PeerState.LEFT])
def test_one_without_a_link_is_dialled_as_soon_as_it_is_heard(state: PeerState) -> None:
    assert commands_of(table_at(state).apply(found(), 2.0), Dial)


def test_a_broken_link_is_dialled_at_once_and_says_why() -> None:
    table = table_at(PeerState.ALIVE)
    commands = table.apply(LinkDown(ANN, "connection reset"), 2.0)
    assert commands == [Dial(ANN, (HOME,)), PublishChange(ANN, PeerState.DEAD, PeerState.ALIVE, "connection reset")]


def test_one_that_left_is_dialled_no_more() -> None:
    commands = table_at(PeerState.ALIVE).apply(GoodbyeReceived(ANN, "stopped"), 2.0)
    assert commands == [StopDialling(ANN), PublishChange(ANN, PeerState.LEFT, PeerState.ALIVE, "stopped")]


def test_refused_is_dialled_no_more_and_says_why() -> None:
    table = table_at(PeerState.FOUND)
    assert commands_of(table.apply(HandshakeRefused(ANN, HOME, "another key"), 2.0), StopDialling) == [StopDialling(ANN)]
    assert table.rows(2.0)[0]["why"] == "another key"


def test_one_that_refused_is_tried_again_when_it_is_heard_again() -> None:
    table = table_at(PeerState.REFUSED)
    assert table.apply(found(), 2.0) == [Dial(ANN, (HOME,))]
    assert table.apply(HandshakeRefused(ANN, HOME, "another key"), 3.0) == [StopDialling(ANN)]


def test_found_but_unreachable_says_why() -> None:
    table = table_at(PeerState.FOUND)
    table.apply(DialFailed(ANN, HOME, "no route to host"), 2.0)
    assert (table.rows(2.0)[0]["state"], table.rows(2.0)[0]["why"]) == ("found", "no route to host")


def test_silence_makes_a_suspect_and_a_word_an_alive_one() -> None:
    table = table_at(PeerState.ALIVE)
    assert table.apply(HeartbeatMissed(ANN), 2.0) == [PublishChange(ANN, PeerState.SUSPECT, PeerState.ALIVE, "silent")]
    assert table.apply(HeartbeatMissed(ANN), 2.5) == []
    assert table.apply(HeartbeatReceived(ANN), 3.0) == [PublishChange(ANN, PeerState.ALIVE, PeerState.SUSPECT, "")]


def test_a_suspect_is_not_planned_with() -> None:
    table = table_at(PeerState.ALIVE)
    table.apply(AdvertReceived(advert()), 2.0)
    assert table.adverts() == [advert()]
    table.apply(HeartbeatMissed(ANN), 3.0)
    assert table.adverts() == []
    assert [peer.id for peer in table.linked()] == [ANN]


def test_only_a_newer_revision_of_the_present_incarnation_counts() -> None:
    table = table_at(PeerState.ALIVE)
    assert table.apply(AdvertReceived(advert(revision=2)), 2.0) == [PublishChange(ANN, PeerState.ALIVE, PeerState.ALIVE, "")]
    assert table.apply(AdvertReceived(advert(revision=1)), 3.0) == []
    assert table.apply(AdvertReceived(advert(incarnation=9, revision=5)), 3.0) == []
    assert table.adverts() == [advert(revision=2)]
    table.apply(AdvertReceived(advert(revision=3)), 4.0)
    assert table.adverts() == [advert(revision=3)]


def test_a_restarted_peer_starts_without_its_old_advert() -> None:
    table = table_at(PeerState.ALIVE)
    table.apply(AdvertReceived(advert(revision=7)), 2.0)
    table.apply(link_up(incarnation=2), 3.0)
    assert table.adverts() == []
    table.apply(AdvertReceived(advert(incarnation=2, revision=1)), 4.0)
    assert table.adverts() == [advert(incarnation=2, revision=1)]


def test_a_link_that_comes_back_keeps_the_advert() -> None:
    table = table_at(PeerState.ALIVE)
    table.apply(AdvertReceived(advert()), 2.0)
    table.apply(LinkDown(ANN, "connection reset"), 3.0)
    assert table.adverts() == []
    table.apply(link_up(), 4.0)
    assert table.adverts() == [advert()]


def test_two_daemons_with_one_identity_are_told_from_a_restart() -> None:
    table = table_at(PeerState.ALIVE)
    table.apply(link_up(incarnation=2), 2.0)
    assert table.rows(2.0)[0]["why"] == ""
    table.apply(link_up(incarnation=1), 3.0)
    assert "copied" in table.rows(3.0)[0]["why"]


def test_a_peer_seen_on_two_addresses_shows_both_with_their_sources() -> None:
    table = PeerTable()
    table.apply(found(ANN, HOME.host), 1.0)
    table.apply(link_up(dialled=AWAY), 2.0)
    assert table.rows(2.0)[0]["addresses"] == [
        {"host": HOME.host, "port": 6375, "source": "mdns"},
        {"host": AWAY.host, "port": 6375, "source": "link"},
    ]


def test_a_sources_new_addresses_replace_its_old_ones() -> None:
    table = table_at(PeerState.FOUND)
    assert commands_of(table.apply(found(ANN, AWAY.host), 2.0), Dial) == [Dial(ANN, (AWAY,))]


def test_a_source_that_takes_its_word_back_leaves_a_linked_peer_alone() -> None:
    table = table_at(PeerState.ALIVE)
    assert table.apply(PeerWithdrawn(source="mdns", peer=ANN), 2.0) == []
    assert table.rows(2.0)[0]["addresses"] == []


def test_addresses_are_bounded() -> None:
    table = PeerTable()
    table.apply(found(ANN, *(f"10.0.1.{host}" for host in range(99))), 1.0)
    table.apply(link_up(dialled=AWAY), 1.0)
    addresses = table.rows(1.0)[0]["addresses"]
    assert len(addresses) == MAX_ADDRESSES
    assert addresses[-1]["source"] == "link"


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


def test_a_static_address_that_refuses_is_tried_seldom() -> None:
    table, static = PeerTable(), found(None, "attic.lan", source="static")
    table.apply(static, 1.0)
    table.apply(HandshakeRefused(None, Address("attic.lan", 6375), "another cluster's key"), 2.0)
    assert table.apply(static, 3.0) == []
    assert (table.rows(3.0)[0]["state"], table.rows(3.0)[0]["why"]) == ("refused", "another cluster's key")
    assert commands_of(table.apply(static, 2.0 + REFUSED_RETRY_S), Dial)


def test_what_was_long_not_heard_of_is_dropped() -> None:
    table = table_at(PeerState.DEAD)
    assert table.expire(RETENTION_S[PeerState.DEAD]) == []
    assert table.expire(RETENTION_S[PeerState.DEAD] + 2.0) == [StopDialling(ANN), PublishChange(ANN, None, PeerState.DEAD, "")]
    assert len(table) == 0


def test_what_is_linked_or_vouched_for_is_never_dropped() -> None:
    alive, vouched = table_at(PeerState.ALIVE), table_at(PeerState.FOUND)
    assert alive.expire(1e9) == vouched.expire(1e9) == []


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


def test_rows_are_json_with_the_same_keys_whatever_is_known() -> None:
    table = table_at(PeerState.ALIVE)
    table.apply(AdvertReceived(advert()), 2.0)
    table.apply(found(BOB), 3.0)
    table.apply(found(None, "attic.lan", source="static"), 3.0)
    rows = table.rows(5.0)
    assert [row["peer"] for row in msgspec.json.decode(msgspec.json.encode(rows))] == [ANN, BOB, ""]
    assert len({tuple(row) for row in rows}) == 1
    assert [row["state"] for row in rows] == ["alive", "found", "found"]
    assert rows[0]["capability"]["rates"]["decode_bytes_s"] == 1e9
    assert (rows[0]["last_seen_s"], rows[1]["last_seen_s"]) == (3.0, 2.0)


PEERS = [PeerId(name) for name in ("ann", "bob", "cat", "dan")]
peers = st.sampled_from(PEERS)
incarnations = st.integers(1, 3)


class Membership(RuleBasedStateMachine):
    """Any events in any order, as a network and several sources might bring them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = PeerTable(max_peers=3)
        self.now = 0.0
        self.dialling: set[PeerId] = set()

    def take(self, event: Event) -> None:
        self.now += 1.0
        before = {peer: self.table.get(peer) for peer in PEERS}
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

    @rule(peer=peers, incarnation=incarnations, revision=st.integers(1, 5))
    def an_advert_comes(self, peer: PeerId, incarnation: int, revision: int) -> None:
        self.take(AdvertReceived(advert(peer, incarnation, revision)))

    @rule(peer=peers, kind=st.sampled_from([HeartbeatReceived, HeartbeatMissed, RetentionExpired]))
    def time_tells(self, peer: PeerId, kind: type[HeartbeatReceived | HeartbeatMissed | RetentionExpired]) -> None:
        self.take(kind(peer))

    @rule(peer=peers, kind=st.sampled_from([LinkDown, GoodbyeReceived]))
    def a_link_ends(self, peer: PeerId, kind: type[LinkDown | GoodbyeReceived]) -> None:
        self.take(kind(peer, "over"))

    @rule(peer=peers, kind=st.sampled_from([DialFailed, HandshakeRefused]))
    def a_dial_fails(self, peer: PeerId, kind: type[DialFailed | HandshakeRefused]) -> None:
        self.take(kind(peer, HOME, "no"))

    @rule(peer=peers)
    def a_source_takes_it_back(self, peer: PeerId) -> None:
        self.take(PeerWithdrawn(source="mdns", peer=peer))

    @rule(
        event=st.sampled_from(
            [
                found(None, "attic", source="static"),
                DialFailed(None, Address("attic", 6375), "no"),
                HandshakeRefused(None, None, "no"),
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
    def it_is_bounded(self) -> None:
        assert len(self.table) <= 3

    @invariant()
    def plans_count_on_the_present_incarnation_of_live_peers_only(self) -> None:
        for each in self.table.adverts():
            known = self.table.get(each.peer)
            assert known is not None
            assert known.state is PeerState.ALIVE
            assert known.incarnation == each.incarnation

    @invariant()
    def nobody_who_left_or_is_forgotten_is_dialled(self) -> None:
        assert all(state_of(self.table, peer) not in {PeerState.LEFT, None} for peer in self.dialling)

    @invariant()
    def who_is_lost_and_can_be_reached_is_dialled(self) -> None:
        for peer in PEERS:
            known = self.table.get(peer)
            if known is not None and known.state in {PeerState.FOUND, PeerState.DEAD} and known.addresses:
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
