"""The monitor on real daemons: every screen fills, commands are carried out, and a killed daemon is found again."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from textual.pilot import Pilot

from meshd.tui.app import Monitor
from meshd.tui.feed import Connected, Disconnected
from meshd.tui.screens.dialogs import Choose, Confirm
from meshd.tui.widgets.event_log import EventLog
from monitor.story import Answering
from monitor.watching import cells_of, text_of, told
from monitor.watching import soon as soon_within
from real_daemons.cluster import Cluster, make_cluster

NAMES = ("desk", "attic", "laptop")
SPLIT = "attic:0-16,laptop:16-30"
soon = partial(soon_within, within_s=60.0)


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[Cluster]:
    for cluster in make_cluster(tmp_path_factory.mktemp("monitor"), shared_cache):
        cluster.start(*NAMES)
        cluster.see_each_other()
        cluster.place("desk", stages=SPLIT)
        cluster.place("desk", stages="desk:0-30")  # where an answer can be moved to
        yield cluster


@asynccontextmanager
async def watching(cluster: Cluster, name: str = "desk") -> AsyncIterator[tuple[Monitor, Pilot[None]]]:
    app = Monitor(cluster[name].api)
    async with app.run_test(size=(140, 40)) as pilot:
        await soon(pilot, lambda: {row[0] for row in cells_of(app, "#peers")} == set(NAMES))
        yield app, pilot


async def beside(function: Callable[[], object]) -> None:
    await asyncio.get_running_loop().run_in_executor(None, function)


async def test_an_answer_is_seen_on_every_screen_moved_and_cancelled(trio: Cluster) -> None:
    async with watching(trio) as (app, pilot):
        answer = Answering(trio["desk"], 2000)
        await pilot.press("3")
        await soon(pilot, lambda: any(row[1] == "decoding" and row[3] != "-" for row in cells_of(app, "#sessions")))
        assert cells_of(app, "#sessions")[0][7] == SPLIT
        await pilot.press("enter")
        await soon(pilot, lambda: "sent 2304 B" in text_of(app, "#graph"))
        await soon(pilot, lambda: "measured -" not in text_of(app, "#graph"))  # the other peer tells of its work a little later
        assert "attic  embed + layers 0-16" in text_of(app, "#graph")
        await pilot.press("5", "n")
        await soon(pilot, lambda: text_of(app, "#peer-name").startswith("attic"))
        attic = next(row["id"] for row in app.cluster.rows["peers"] if row["name"] == "attic")
        await soon(pilot, lambda: max(app.cluster.histories.of(attic).tokens_s, default=0) > 0)
        await pilot.press("6")
        await soon(pilot, lambda: any("is decoding" in line for line in app.screen.query_one(EventLog).texts))
        await pilot.press("3", "m")
        await soon(pilot, lambda: isinstance(app.screen, Choose))
        await pilot.press("enter")  # to desk, the first peer
        await soon(pilot, lambda: any("moves ..." in line for line in told(app)))
        await soon(pilot, lambda: any("runs on desk:" in line for line in told(app)))
        await soon(pilot, lambda: cells_of(app, "#sessions")[0][8].startswith(("prefill", "replay", "kept", "mirror")))
        await pilot.press("c")
        await soon(pilot, lambda: isinstance(app.screen, Confirm))
        await pilot.press("y")
        await soon(pilot, lambda: cells_of(app, "#sessions") == [])
        await beside(partial(answer.wait, 30))
        assert not answer.running


async def test_models_are_placed_and_unplaced_and_a_plan_is_shown(trio: Cluster) -> None:
    async with watching(trio) as (app, pilot):
        await pilot.press("4")
        await soon(pilot, lambda: any(row[0] == "smollm2:135m" for row in cells_of(app, "#models")))
        model = next(row["id"] for row in app.cluster.rows["models"] if row["name"] == "smollm2:135m")
        await app.show_plan("model", model)
        await soon(pilot, lambda: "what a new placement would be" in text_of(app, "#graph"))
        await pilot.press("4")
        await pilot.pause()
        app.screen.query_one("#models").select(model)  # type: ignore[attr-defined]
        await pilot.press("u")
        await soon(pilot, lambda: isinstance(app.screen, Confirm))
        await pilot.press("y")

        def held() -> str:
            return next(row[4] for row in cells_of(app, "#models") if row[0] == "smollm2:135m")

        await soon(pilot, lambda: held() == "-")
        await pilot.press("p")
        await soon(pilot, lambda: "smollm2:135m is placed" in told(app))
        await soon(pilot, lambda: held() != "-")
    trio.place("desk", stages=SPLIT)


async def test_a_peer_is_drained_and_takes_work_again(trio: Cluster) -> None:
    async with watching(trio) as (app, pilot):

        def state() -> str:
            return next(row[1] for row in cells_of(app, "#peers") if row[0] == "desk")

        await pilot.press("d")
        await soon(pilot, lambda: isinstance(app.screen, Confirm))
        await pilot.press("y")
        await soon(pilot, lambda: state() == "alive, draining")
        await pilot.press("d")
        await soon(pilot, lambda: state() == "alive")


async def test_a_killed_peer_and_a_killed_daemon(trio: Cluster) -> None:
    async with watching(trio, "attic") as (app, pilot):
        answer = Answering(trio["desk"], 150)  # another peer coordinates it
        await soon(pilot, lambda: any(row["state"] == "decoding" for row in app.cluster.sessions()))
        trio["laptop"].kill()
        await soon(pilot, lambda: "laptop is left out" in text_of(app, "#left-out"))
        await soon(pilot, lambda: bool(app.cluster.recoveries))
        await beside(partial(answer.wait, 60))
        assert answer.error == ""
        api = trio["attic"].api.removeprefix("http://")
        trio["attic"].kill()  # the others find it again by the desk
        await soon(pilot, lambda: "not connected" in text_of(app, "#connection"))
        assert isinstance(app.connection, Disconnected)
        starting = threading.Thread(target=partial(trio.start, "attic", flags=("--api", api)))
        starting.start()
        await soon(pilot, lambda: isinstance(app.connection, Connected))
        await soon(pilot, lambda: {row[0]: row[1] for row in cells_of(app, "#peers")}.get("desk") == "alive")
        await soon(pilot, lambda: not app.screen.query_one("#connection").display)
        await beside(starting.join)
