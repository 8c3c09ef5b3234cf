import msgspec

from in_process.peer_events import ANN, BOB, PROFILE_CAME, found, link_up, status
from meshd.agents.membership.peer_events import PeerState
from meshd.agents.membership.peer_rows import unlinked_row
from meshd.agents.membership.peer_table import PeerTable
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
