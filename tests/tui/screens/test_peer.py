"""The screen of one peer."""

from textual.widgets import Input

from meshd.tui.screens.logs import LogScreen
from meshd.tui.widgets.spark import Spark
from monitor.watching import Watch, soon, text_of


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
