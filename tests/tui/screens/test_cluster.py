"""The screen of the cluster: peers, links, why one is left out, and draining."""

import pytest
from textual.widgets import DataTable

from fake_api.rows_server import Api
from meshd.tui.screens.cluster import battery, celsius, percent
from meshd.tui.screens.dialogs import Confirm
from meshd.tui.screens.peer import PeerScreen
from monitor.watching import Watch, cells_of, soon, text_of, told


async def test_peers_and_links_are_shown_with_what_they_do(watch: Watch) -> None:
    async with watch((160, 40)) as (app, _):
        rows = {row[0]: row for row in cells_of(app, "#peers")}
        assert set(rows) == {"desk", "attic", "laptop"}
        name, state, memory, load, tokens, sessions, holds, decode, *_ = rows["attic"]
        assert (name, state) == ("attic", "alive")
        assert memory.endswith("GiB free")
        assert "█" in memory
        assert load.endswith(" %")
        assert float(tokens) >= 0
        assert sessions == "2"
        assert holds.startswith("smollm2:135m 0-16")
        assert decode.endswith("GB/s")
        assert rows["laptop"][1] != "alive"
        links = {tuple(row[:2]): row for row in cells_of(app, "#links")}
        assert links["desk", "attic"][4].endswith("B/s")
        assert text_of(app, "#left-out").startswith("laptop is left out: ")


async def test_enter_shows_the_peer(watch: Watch) -> None:
    async with watch() as (app, pilot):
        app.screen.query_one("#peers", DataTable).focus()
        await pilot.press("down", "enter")
        await soon(pilot, lambda: isinstance(app.screen, PeerScreen))
        await soon(pilot, lambda: text_of(app, "#peer-name").startswith("attic"))


async def test_a_peer_is_drained_after_a_question(watch: Watch, api: Api) -> None:
    api.answer("POST", "/mesh/v1/drain", {"peer": "p", "name": "desk", "sessions_left": 2})
    async with watch() as (app, pilot):
        await pilot.press("d")
        await soon(pilot, lambda: isinstance(app.screen, Confirm))
        await pilot.press("n")
        await pilot.pause()
        assert api.requests == []
        await pilot.press("d")
        await soon(pilot, lambda: isinstance(app.screen, Confirm))
        await pilot.press("y")
        await soon(pilot, lambda: told(app))
        assert told(app) == ["desk drains, 2 sessions still run there"]
        assert api.bodies[0]["undo"] is False


@pytest.mark.parametrize(
    ("device", "shown"),
    [
        ({}, "-"),
        ({"on_mains": True}, "mains"),
        ({"battery": 0.41, "on_mains": False}, "41 %"),
        ({"battery": 1.0, "on_mains": True}, "100 % mains"),
    ],
)
def test_batteries(device: dict[str, object], shown: str) -> None:
    assert battery(device) == shown


def test_what_a_device_does_not_show() -> None:
    assert (percent(None), percent(0.5), celsius(None), celsius(48.4)) == ("-", "50 %", "-", "48 C")
