"""The screen of one peer."""

from typing import Any

from textual.widgets import Input

from meshd.tui.app import Monitor
from meshd.tui.feed import Connected
from meshd.tui.screens.logs import LogScreen
from meshd.tui.widgets.spark import Spark
from monitor.recorded import ScriptedFeed
from monitor.watching import Watch, cells_of, soon, text_of


async def test_peers_are_shown_one_after_the_other(watch: Watch) -> None:
    async with watch() as (app, pilot):
        await pilot.press("5")
        await soon(pilot, lambda: text_of(app, "#peer-name").startswith("desk"))
        seen = []
        for key in ("n", "right", "n", "b", "left"):
            await pilot.press(key)
            seen.append(text_of(app, "#peer-name").split()[0])
        assert seen == ["attic", "laptop", "desk", "laptop", "attic"]
        facts = text_of(app, "#facts")
        assert "smollm2:135m 0-16, KV " in facts
        assert "link to desk" in facts
        values = app.screen.query_one("#spark-tokens", Spark).values
        assert max(values) > 0
        assert any(mark in app.screen.query_one("#spark-tokens", Spark).render().plain for mark in "▁▂▃▄▅▆▇█")


async def test_why_a_peer_is_left_out_and_the_way_to_its_log(watch: Watch) -> None:
    async with watch() as (app, pilot):
        await pilot.press("5", "b")
        await soon(pilot, lambda: text_of(app, "#peer-name").startswith("laptop"))
        assert "why it is left out" in text_of(app, "#facts")
        await pilot.press("l")
        await soon(pilot, lambda: isinstance(app.screen, LogScreen))
        await soon(pilot, lambda: app.screen.query_one(Input).value == "peer:laptop")


def row(name: str, identifier: str, reason: str = "") -> dict[str, Any]:
    """An event with the row of a peer; one without an id is known only by its address."""
    row = {
        "id": identifier, "name": name, "state": "refused" if reason else "alive", "reason": reason, "addresses": [f"{name}:6375"],
        "holdings": [], "capability": None, "models": [], "sessions": 0, "version": "", "device": None,
    }  # fmt: skip
    return {"type": "row", "list": "peers", "key": name, "row": row}


async def test_a_peer_without_an_id_is_shown_itself_and_one_that_goes_is_not_replaced_by_another() -> None:
    feed = ScriptedFeed()
    app = Monitor(feed.api, feed=feed, now=feed.now)
    async with app.run_test() as pilot:
        for item in (Connected(resumed=False), row("desk", "d" * 52), row("10.0.0.9", "", "its key is another one")):
            feed.items.put_nowait(item)
        await soon(pilot, lambda: len(cells_of(app, "#peers")) == 2)
        app.screen.query_one("#peers").focus()
        await pilot.press("down", "enter")
        await soon(pilot, lambda: app.screen.query("#peer-name") and text_of(app, "#peer-name").startswith("10.0.0.9"))
        assert "its key is another one" in text_of(app, "#facts")
        feed.items.put_nowait({"type": "gone", "list": "peers", "key": "10.0.0.9"})
        await soon(pilot, lambda: text_of(app, "#peer-name") == "this peer is not known any more")
        assert text_of(app, "#facts") == ""
        await pilot.press("n")
        assert text_of(app, "#peer-name").startswith("desk")
