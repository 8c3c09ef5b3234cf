"""One peer: the last two minutes of it, what it is, and what it holds."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.widgets import Label, Static

from meshd.bounds import printable
from meshd.display import ABSENT, duration, flops, rate, short_id, size
from meshd.tui.rates import PeerHistory
from meshd.tui.rows import Row, peer_key
from meshd.tui.screens.cluster import battery, celsius, holding_state, percent
from meshd.tui.screens.listing import ListingScreen
from meshd.tui.widgets.spark import Spark

_SERIES = ("tokens", "memory", "hop", "busy")
_SHARES = frozenset({"memory", "busy"})
_TITLES = {"tokens": "tokens/s", "memory": "memory used", "hop": "hop time", "busy": "compute busy"}


class PeerScreen(ListingScreen):
    """Sparklines above, details below."""

    NAME = "peer"
    PARTS = frozenset({"peers", "links", "models", "history"})
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("right,n", "step(1)", "Next peer"),
        Binding("left,b", "step(-1)", "Previous peer"),
        Binding("l", "logs", "Its log"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.peer = ""
        """Key of the peer that is shown; empty for the first one."""

    def body(self) -> ComposeResult:
        yield Static(id="peer-name")
        for name in _SERIES:
            with Horizontal(classes="series"):
                yield Label(_TITLES[name], classes="series-title")
                yield Spark(1.0 if name in _SHARES else None, id=f"spark-{name}")
                yield Label("", id=f"value-{name}", classes="series-value")
        with VerticalScroll(id="details"):
            yield Static(id="facts")

    def draw(self) -> None:
        row = self._row()
        self.query_one("#peer-name", Static).update(self._title(row))
        for name, series, value in _series(self.cluster.histories.of(row["id"] if row else "")):
            self.query_one(f"#spark-{name}", Spark).values = tuple(series)
            self.query_one(f"#value-{name}", Label).update(value)
        facts = list(self._facts(row)) if row else []
        width = max((len(name) for name, _ in facts), default=0)
        lines = [Text.assemble((f"{name:{width}}  ", self.paint.dim), printable(value)) for name, value in facts]
        self.query_one("#facts", Static).update(Text("\n").join(lines))

    def _title(self, row: Row | None) -> Text:
        if row is None:
            return Text("this peer is not known any more" if self.peer else "no peer is known yet")
        name = printable(row["name"]), "bold"
        return Text.assemble(name, f"  {short_id(row['id']) or ABSENT}  ", self.paint.state(row["state"]))

    def _row(self) -> Row | None:
        if self.peer:
            return self.cluster.peer(self.peer)
        return next(iter(self.cluster.rows["peers"]), None)

    def action_step(self, by: int) -> None:
        peers = [peer_key(row) for row in self.cluster.rows["peers"]]
        row = self._row()
        if peers:
            self.peer = peers[(peers.index(peer_key(row)) + by) % len(peers)] if row else peers[0]
            self.draw()

    async def action_logs(self) -> None:
        row = self._row()
        if row is not None:
            await self.monitor.show_logs(f"peer:{row['name']}")

    def _facts(self, row: Row) -> Iterator[tuple[str, str]]:
        if row["reason"]:
            yield "why it is left out", row["reason"] + (f"; {row['hint']}" if row.get("hint") else "")
        yield "addresses", ", ".join(row["addresses"]) or ABSENT
        yield "version", row["version"] or ABSENT
        capability, device = row["capability"], row.get("device") or {}
        if capability:
            rates = capability["rates"]
            yield "processor", f"{capability['processor']}, {capability['threads']} threads, {capability['backend']}"
            yield "memory", f"{size(capability['memory_free_bytes'])} free of {size(capability['memory_total_bytes'])}"
            yield "decode, prefill", f"{rate(rates['decode_bytes_s'])}, {flops(rates['prefill_flops_s'])}"
            yield "disk", rate(rates["disk_bytes_s"])
            yield "load", percent(device.get("load"))
            yield "temperature", celsius(device.get("temperature_c"))
            yield "battery", battery(device)
        yield "sessions", str(row["sessions"]) + (", draining" if row.get("draining") else "")
        for held in row["holdings"]:
            kv = f", KV {held['kv_tokens_free']} of {held['kv_tokens_total']} tokens free"
            yield "holds", f"{self.cluster.model_name(held['model'])} {held['layers']}{holding_state(held)}{kv}"
        yield "on disk", ", ".join(row["models"]) or ABSENT
        for link in self.cluster.rows["links"]:
            if link["source"] == row["id"]:
                times = f"round trip {duration(link['rtt_s'])}, hop {duration(link['hop_s'] or None)}"
                yield f"link to {link['target_name']}", f"{times}, {rate(link['bandwidth_bytes_s'])}"


def _series(history: PeerHistory) -> Iterator[tuple[str, Sequence[float], str]]:
    yield "tokens", history.tokens_s, f"{history.tokens_s[-1]:.1f}" if history.tokens_s else ABSENT
    yield "memory", history.memory, percent(history.memory[-1]) if history.memory else ABSENT
    yield "hop", history.hop_s, duration(history.hop_s[-1]) if history.hop_s else ABSENT
    yield "busy", history.busy, percent(history.busy[-1]) if history.busy else ABSENT
