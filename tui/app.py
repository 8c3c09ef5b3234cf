"""`meshd top`: the cluster on a terminal. It reads one daemon's events over HTTP, and sends it the user's commands."""

import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import ClassVar, cast

from textual.app import App, ScreenStackError, SystemCommand
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.screen import Screen
from textual.worker import Worker

from meshd.tui.cluster import ClusterState
from meshd.tui.commands import CommandFailed, Commands
from meshd.tui.feed import Connected, Disconnected, Feed
from meshd.tui.messages import ClusterChanged, ConnectionChanged
from meshd.tui.screens.cluster import ClusterScreen
from meshd.tui.screens.dialogs import Help
from meshd.tui.screens.listing import ListingScreen
from meshd.tui.screens.logs import LogScreen
from meshd.tui.screens.models import ModelScreen
from meshd.tui.screens.peer import PeerScreen
from meshd.tui.screens.plan import PlanScreen
from meshd.tui.screens.sessions import SessionScreen

FRAME_S = 0.2
"""Events are collected for so long before they are shown. Drawing a table costs far more than reading the events (bench_events)."""
_SCREENS: tuple[type[ListingScreen], ...] = (ClusterScreen, PlanScreen, SessionScreen, ModelScreen, PeerScreen, LogScreen)
_KEYS = {"question_mark": "?", "slash": "/"}


class Monitor(App[None]):
    """The application. It owns the cluster's state, and tells the present screen what has changed."""

    TITLE = "meshd"
    CSS_PATH = "meshd.tcss"
    MODES: ClassVar[dict[str, str | Callable[[], Screen[object]]]] = {screen.NAME: screen for screen in _SCREENS}  # type: ignore[misc]
    DEFAULT_MODE = ClusterScreen.NAME
    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(str(number), f"switch_mode('{screen.NAME}')", screen.NAME.capitalize(), show=False)
            for number, screen in enumerate(_SCREENS, 1)
        ),
        Binding("question_mark", "help", "Help"),
        Binding("t", "theme", "Light or dark", show=False),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(self, api: str, api_key: str = "", *, now: Callable[[], float] = time.monotonic, feed: Feed | None = None) -> None:
        super().__init__()
        self.api = api
        self.cluster = ClusterState()
        self.commands = Commands(api, api_key)
        self.connection: Connected | Disconnected | None = None
        self.pulling: dict[str, Worker[None]] = {}
        """The pulls that were started here, by model."""
        self._now = now
        self._feed = feed or Feed(api, api_key)
        self._changed: frozenset[str] = frozenset()

    def on_mount(self) -> None:
        self.run_worker(self._read(), name="feed", exclusive=True)
        self.set_interval(FRAME_S, self.show_changes)

    async def _read(self) -> None:
        async for item in self._feed.events():
            if isinstance(item, Connected | Disconnected):
                self._on_connection(item)
                continue
            try:
                self._changed |= self.cluster.apply(item, self._now())
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                self.log(f"an event that this version can't read: {error!r}")

    def _on_connection(self, state: Connected | Disconnected) -> None:
        self.connection = state
        if isinstance(state, Connected) and not state.resumed:
            self.cluster.restart()
        self._tell(ConnectionChanged())

    def show_changes(self) -> None:
        """Tell the present screen what has changed since the last frame."""
        self._changed |= self.cluster.tick(self._now())
        if self._changed:
            self._tell(ClusterChanged(self._changed))
            self._changed = frozenset()

    def _tell(self, message: Message) -> None:
        """Send a message to the present screen. There is none any more while the application ends."""
        with suppress(ScreenStackError):
            self.screen.post_message(message)

    def act(self, begun: str, command: Callable[[], Awaitable[str]]) -> None:
        """Carry a command out beside everything else. Shows `begun`, and at the end the text that `command` returns."""
        if begun:
            self.notify(begun, markup=False)
        self.run_worker(self._run(command), group="commands")

    async def _run(self, command: Callable[[], Awaitable[str]]) -> None:
        try:
            self.notify(await command(), markup=False)
        except CommandFailed as error:
            self.notify(str(error), severity="error", markup=False, timeout=10)

    def pull(self, model: str) -> None:
        """Fetch a model to the daemon's disk, beside everything else."""
        if model in self.pulling:
            self.notify(f"{model} is being pulled already", markup=False)
            return

        async def pull() -> str:
            try:
                await self.commands.pull(model)
            finally:
                self.pulling.pop(model, None)
            return f"{model} is here"

        self.pulling[model] = self.run_worker(self._run(pull), group="pulls")

    def stop_pull(self, model: str) -> None:
        """Stop a pull that was started here."""
        if (worker := self.pulling.pop(model, None)) is not None:
            worker.cancel()
            self.notify(f"the pull of {model} is stopped", markup=False)

    async def show_plan(self, kind: str, identifier: str) -> None:
        """Show the plan of a `session` or a `model`."""
        await self.switch_mode(PlanScreen.NAME)
        cast("PlanScreen", self.screen).show(kind, identifier)

    async def show_peer(self, peer: str) -> None:
        """Show a peer's details."""
        await self.switch_mode(PeerScreen.NAME)
        screen = cast("PeerScreen", self.screen)
        screen.peer = peer
        screen.draw()

    async def show_logs(self, wanted: str) -> None:
        """Show the lines that match a filter."""
        await self.switch_mode(LogScreen.NAME)
        cast("LogScreen", self.screen).show(wanted)

    def action_help(self) -> None:
        self.push_screen(
            Help([("Everywhere", _keys(self.BINDINGS)), *((s.NAME.capitalize(), _keys(s.BINDINGS)) for s in _SCREENS)])
        )

    def action_theme(self) -> None:
        self.theme = "textual-light" if self.current_theme.dark else "textual-dark"

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """Offer everything that has a key, in the palette too."""
        yield from super().get_system_commands(screen)
        for number, each in enumerate(_SCREENS, 1):
            yield SystemCommand(f"Show {each.NAME}", f"Key {number}", lambda name=each.NAME: self.switch_mode(name))
        yield SystemCommand("Help", "All keys", self.action_help)
        yield SystemCommand("Light or dark", "Change between the two themes", self.action_theme)
        for binding in screen.BINDINGS if isinstance(screen, ListingScreen) else ():
            if isinstance(binding, Binding) and binding.description:
                act = lambda action=binding.action: self.run_action(action, screen)  # noqa: E731
                yield SystemCommand(binding.description, f"On this screen: key {binding.key}", act)


def _keys(bindings: Iterable[BindingType]) -> list[tuple[str, str]]:
    shown = (binding for binding in bindings if isinstance(binding, Binding) and binding.description)
    return [(", ".join(_KEYS.get(key, key) for key in binding.key.split(",")), binding.description) for binding in shown]
