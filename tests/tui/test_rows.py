"""Rows are what events add up to."""

import pytest

from meshd.tui import rows
from meshd.tui.rows import LISTINGS, ClusterRows


def row(listing: str, key: str, **values: object) -> dict[str, object]:
    return {"type": "row", "list": listing, "key": key, "row": values}


def test_rows_come_change_and_go_in_their_order() -> None:
    known = ClusterRows()
    for key in ("a", "b", "c"):
        assert known.apply(row("peers", key, name=key)) == {"peers"}
    known.apply(row("peers", "a", name="other"))
    assert known.apply({"type": "gone", "list": "peers", "key": "b"}) == {"peers"}
    known.apply({"type": "gone", "list": "peers", "key": "never there"})
    assert [each["name"] for each in known["peers"]] == ["other", "c"]
    assert known["links"] == []


@pytest.mark.parametrize(
    "event",
    [
        {"type": "row", "list": "of a later version", "key": "k", "row": {}},
        {"type": "row", "list": "peers", "key": 5, "row": {}},
        {"type": "row", "list": "peers", "key": "k", "row": "text"},
        {"type": "peer", "state": "alive"},
        {},
    ],
)
def test_what_is_not_understood_changes_nothing(event: dict[str, object]) -> None:
    known = ClusterRows()
    assert known.apply(event) == frozenset()
    assert all(known[listing] == [] for listing in LISTINGS)


def test_lost_events_clear_the_rows_that_follow_again() -> None:
    known = ClusterRows()
    known.apply(row("models", "m"))
    assert known.apply({"type": "lost", "events": 3}) == frozenset(LISTINGS)
    assert known["models"] == []


def test_there_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_ROWS", 2)
    known = ClusterRows()
    for key in ("a", "b", "c", "a"):
        known.apply(row("peers", key, name=key))
    assert [each["name"] for each in known["peers"]] == ["a", "b"]
