"""The state machine of one peer: every event in every state, and the commands that follow."""

import itertools
from copy import copy

import pytest

from in_process.peer_events import ANN, AWAY, EVENTS_TO, HOME, PROFILE_CAME, PROFILE_HASH, advert, found, link_up, status
from meshd.agents.machine import IllegalTransition
from meshd.agents.membership.peer import MAX_ADDRESSES, RETENTION_S, TRANSITIONS, KnownAddress, Peer
from meshd.agents.membership.peer_events import (
    Command,
    Dial,
    DialFailed,
    Event,
    FetchPeerProfile,
    GoodbyeReceived,
    HandshakeRefused,
    HeartbeatMissed,
    HeartbeatReceived,
    LinkDown,
    PeerState,
    PublishChange,
    RetentionExpired,
    StopDialling,
)
from meshd.agents.membership.sources import PeerWithdrawn

EVENTS: list[Event] = [
    found(),
    PeerWithdrawn(source="mdns", peer=ANN),
    link_up(),
    LinkDown(ANN, "connection reset"),
    DialFailed(ANN, HOME, "connection refused"),
    HandshakeRefused(ANN, HOME, "another key"),
    status(),
    PROFILE_CAME,
    HeartbeatReceived(ANN),
    HeartbeatMissed(ANN),
    GoodbyeReceived(ANN, "stopped"),
    RetentionExpired(ANN),
]


def handle(peer: Peer, event: Event, now: float) -> list[Command]:
    peer.now = now
    commands = peer.handle(event)
    peer.validate()
    return commands


def peer_at(state: PeerState) -> Peer:
    peer = Peer(id=ANN, now=1.0)
    for event in EVENTS_TO[state]:
        handle(peer, event, 1.0)
    return peer


def commands_of(commands: list[Command], kind: type) -> list[Command]:
    return [command for command in commands if isinstance(command, kind)]


@pytest.mark.parametrize(
    ("state", "event"), list(itertools.product(PeerState, EVENTS)), ids=lambda each: getattr(each, "name", type(each).__name__)
)
def test_every_event_in_every_state_does_what_its_row_says(state: PeerState, event: Event) -> None:
    peer = peer_at(state)
    assert peer.state is state
    before = copy(peer)
    transition = TRANSITIONS.get((state, type(event)))
    if transition is not None:
        handle(peer, event, 2.0)
        assert (peer.state,) == (transition.to or (state,))
    else:
        with pytest.raises(IllegalTransition, match=f"peer ann: {type(event).__name__} in state {state.value}"):
            handle(peer, event, 2.0)
        assert peer == before


def test_the_table_covers_every_state_and_event() -> None:
    assert {state for state, _ in TRANSITIONS} == set(PeerState)
    assert {event for _, event in TRANSITIONS} == {type(event) for event in EVENTS}


def test_an_illegal_event_is_reported_with_the_peers_story() -> None:
    with pytest.raises(
        IllegalTransition, match=r"LinkDown in state dead \(after .*found -LinkUp-> alive, alive -LinkDown-> dead\)"
    ):
        handle(peer_at(PeerState.DEAD), LinkDown(ANN, "again"), 2.0)


def test_a_peer_that_is_found_is_dialled_at_all_its_addresses() -> None:
    commands = handle(peer_at(PeerState.UNKNOWN), found(ANN, HOME.host, AWAY.host), 1.0)
    assert commands == [Dial(ANN, (HOME, AWAY)), PublishChange(ANN, PeerState.FOUND, PeerState.UNKNOWN, "")]


def test_a_linked_peer_is_not_dialled_when_a_source_reports_it() -> None:
    assert handle(peer_at(PeerState.ALIVE), found(), 2.0) == []


@pytest.mark.parametrize(
    "state", [PeerState.FOUND, PeerState.UNREACHED, PeerState.DEAD, PeerState.REFUSED, PeerState.LEFT], ids=lambda state: state.name
)
def test_a_peer_without_a_link_is_dialled_when_a_source_reports_it(state: PeerState) -> None:
    assert commands_of(handle(peer_at(state), found(), 2.0), Dial)


def test_a_peer_whose_link_breaks_is_dialled_at_once_and_has_the_reason() -> None:
    peer = peer_at(PeerState.ALIVE)
    commands = handle(peer, LinkDown(ANN, "connection reset"), 2.0)
    assert commands == [Dial(ANN, (HOME,)), PublishChange(ANN, PeerState.DEAD, PeerState.ALIVE, "connection reset")]


def test_a_peer_that_left_is_not_dialled() -> None:
    commands = handle(peer_at(PeerState.ALIVE), GoodbyeReceived(ANN, "stopped"), 2.0)
    assert commands == [StopDialling(ANN), PublishChange(ANN, PeerState.LEFT, PeerState.ALIVE, "stopped")]


def test_a_refused_peer_has_the_reason_and_is_dialled_now_and_then() -> None:
    peer = peer_at(PeerState.FOUND)
    assert handle(peer, HandshakeRefused(ANN, HOME, "another protocol", "den"), 2.0) == [
        Dial(ANN, (HOME,)),
        PublishChange(ANN, PeerState.REFUSED, PeerState.FOUND, "another protocol"),
    ]
    assert (peer.why, peer.name) == ("another protocol", "den")
    assert handle(peer, found(), 2.0) == [Dial(ANN, (HOME,))]


def test_a_refused_peer_stays_while_it_is_refused_again_and_goes_when_nobody_answers() -> None:
    peer = peer_at(PeerState.REFUSED)
    for now in range(30, 3000, 30):
        handle(peer, HandshakeRefused(ANN, HOME, "another protocol"), float(now))
        assert not peer.is_over
    handle(peer, DialFailed(ANN, HOME, "connection refused"), 3000.0)
    assert (peer.state, peer.why) == (PeerState.UNREACHED, "connection refused")
    peer.now = 3001.0 + RETENTION_S[PeerState.UNREACHED]
    assert peer.is_over


def test_a_peer_that_does_not_answer_is_not_reached_for_a_reason_and_repeated_reports_do_not_keep_it() -> None:
    peer = peer_at(PeerState.FOUND)
    for now in range(2, 200):
        handle(peer, found(), float(now))
        handle(peer, DialFailed(ANN, HOME, "no route to host"), float(now))
    assert (peer.state, peer.why) == (PeerState.UNREACHED, "no route to host")
    assert peer.is_over


def test_addresses_from_other_peers_come_after_those_from_the_lan() -> None:
    peer = peer_at(PeerState.FOUND)
    handle(peer, found(ANN, AWAY.host, source="gossip"), 2.0)
    assert [known.source for known in peer.addresses] == ["mdns", "gossip"]


def test_silence_makes_a_suspect_and_a_heartbeat_makes_it_alive_again() -> None:
    peer = peer_at(PeerState.ALIVE)
    assert handle(peer, HeartbeatMissed(ANN), 2.0) == [PublishChange(ANN, PeerState.SUSPECT, PeerState.ALIVE, "silent")]
    assert handle(peer, HeartbeatMissed(ANN), 2.5) == []
    assert handle(peer, HeartbeatReceived(ANN), 3.0) == [PublishChange(ANN, PeerState.ALIVE, PeerState.SUSPECT, "")]


def test_a_peer_is_known_whole_once_its_profile_and_its_status_are_there() -> None:
    peer = peer_at(PeerState.ALIVE)
    assert handle(peer, status(), 2.0) == [FetchPeerProfile(ANN, PROFILE_HASH)]
    assert peer.advert is None
    assert handle(peer, PROFILE_CAME, 3.0) == [PublishChange(ANN, PeerState.ALIVE, PeerState.ALIVE, "")]
    assert peer.advert == advert()


def test_a_profile_is_fetched_when_its_hash_changes_and_the_old_one_is_used_until_then() -> None:
    peer = known_peer()
    assert handle(peer, status(revision=2), 3.0) == [PublishChange(ANN, PeerState.ALIVE, PeerState.ALIVE, "")]
    commands = handle(peer, status(revision=3, profile="11" * 16), 4.0)
    assert commands_of(commands, FetchPeerProfile) == [FetchPeerProfile(ANN, "11" * 16)]
    assert peer.advert == advert(revision=3)


def known_peer() -> Peer:
    peer = peer_at(PeerState.ALIVE)
    handle(peer, status(), 2.0)
    handle(peer, PROFILE_CAME, 2.0)
    return peer


def test_only_a_newer_revision_counts() -> None:
    peer = known_peer()
    handle(peer, status(revision=2), 2.0)
    assert handle(peer, status(revision=1), 3.0) == []
    assert peer.advert == advert(revision=2)


def test_a_restarted_peer_starts_without_its_old_status_and_keeps_its_profile_if_that_is_the_same() -> None:
    peer = known_peer()
    handle(peer, status(revision=7), 2.0)
    handle(peer, link_up(incarnation=2), 3.0)
    assert peer.advert is None
    assert commands_of(handle(peer, status(revision=1), 4.0), FetchPeerProfile) == []
    assert peer.advert == advert(incarnation=2, revision=1)


def test_a_link_that_comes_back_keeps_the_advert() -> None:
    peer = known_peer()
    handle(peer, LinkDown(ANN, "connection reset"), 3.0)
    handle(peer, link_up(), 4.0)
    assert peer.advert == advert()


def test_two_daemons_with_one_identity_are_not_taken_for_a_restart() -> None:
    peer = peer_at(PeerState.ALIVE)
    handle(peer, link_up(incarnation=2), 2.0)
    assert peer.why == ""
    handle(peer, link_up(incarnation=1), 3.0)
    assert "copied" in peer.why


def test_a_peer_seen_on_two_addresses_shows_both_with_their_sources() -> None:
    peer = peer_at(PeerState.UNKNOWN)
    handle(peer, found(ANN, HOME.host), 1.0)
    handle(peer, link_up(dialled=AWAY), 2.0)
    assert peer.addresses == (KnownAddress(HOME, "mdns"), KnownAddress(AWAY, "link"))


def test_a_sources_new_addresses_replace_its_old_ones() -> None:
    peer = peer_at(PeerState.FOUND)
    assert commands_of(handle(peer, found(ANN, AWAY.host), 2.0), Dial) == [Dial(ANN, (AWAY,))]


def test_a_source_that_withdraws_a_linked_peer_leaves_its_state_alone() -> None:
    peer = peer_at(PeerState.ALIVE)
    assert handle(peer, PeerWithdrawn(source="mdns", peer=ANN), 2.0) == []
    assert peer.addresses == ()


def test_addresses_are_bounded() -> None:
    peer = peer_at(PeerState.UNKNOWN)
    handle(peer, found(ANN, *(f"10.0.1.{host}" for host in range(99))), 1.0)
    handle(peer, link_up(dialled=AWAY), 1.0)
    assert len(peer.addresses) == MAX_ADDRESSES
    assert peer.addresses[-1].source == "link"


@pytest.mark.parametrize(
    ("state", "ends"), [(PeerState.ALIVE, False), (PeerState.FOUND, True), (PeerState.DEAD, True), (PeerState.LEFT, True)]
)
def test_a_peer_without_a_link_is_over_after_its_retention(state: PeerState, ends: bool) -> None:
    peer = peer_at(state)
    peer.now = 1.0 + RETENTION_S.get(state, 1e9)
    assert not peer.is_over
    peer.now += 1.0
    assert peer.is_over is ends
