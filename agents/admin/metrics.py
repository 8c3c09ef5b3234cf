"""Metrics that are read from the agents at each scrape, and those that are counted from this peer's events."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from meshd.agents.links.links import Links
from meshd.agents.links.meters.traffic import KINDS
from meshd.agents.links.probe import LinkProber
from meshd.agents.membership.peer_events import PeerState
from meshd.agents.membership.peer_table import PeerTable
from meshd.agents.observe.events import Event, HoldingChanged, PeerChanged, SessionChanged
from meshd.agents.observe.stream import EventStream
from meshd.agents.placement.free_memory import FreeMemory
from meshd.agents.placement.resident import ResidentModels
from meshd.agents.session.coordinator import Coordinator
from meshd.agents.session.journal.deputy import Deputy
from meshd.agents.session.journal.writer import JournalWriters
from meshd.agents.stage.host import StageHost
from meshd.agents.supervisor import Supervisor
from meshd.clock import Clock
from meshd.kernels.kv.memory import PAGE_TOKENS
from meshd.telemetry import Telemetry

_ENDS = {"finished", "failed", "cancelled", "suspended"}
_STATES = tuple(state.value for state in PeerState if state is not PeerState.UNKNOWN)


@dataclass(slots=True)
class EventMetrics:
    """Counts what this peer's events tell."""

    telemetry: Telemetry
    clock: Clock
    _loading: dict[tuple[str, str], float] = field(default_factory=dict)
    """When each load that runs began, by model and layers."""

    def count(self, event: Event) -> None:
        """Count an event of this peer."""
        match event:
            case SessionChanged(state=state) if state in _ENDS:
                self.telemetry.session_ended(state)
            case PeerChanged(state=state, was=was) if state != was:
                self.telemetry.peer_changed(state)
            case HoldingChanged(model=model, layers=layers, state="loading"):
                self._loading[model, layers] = self.clock.monotonic()
            case HoldingChanged(model=model, layers=layers, state="active" | "released" as state):
                began = self._loading.pop((model, layers), None)
                if began is not None:
                    self.telemetry.load_ended("active" if state == "active" else "failed", self.clock.monotonic() - began)


@dataclass(eq=False)
class PeerCollector(Collector):
    """The present state of a peer's agents as metrics. It holds nothing itself."""

    table: PeerTable
    links: Links
    prober: LinkProber
    holdings: ResidentModels
    memory: FreeMemory
    memory_total_bytes: int
    stages: StageHost
    coordinator: Coordinator
    journal: JournalWriters
    deputy: Deputy
    stream: EventStream
    supervisor: Supervisor

    def describe(self) -> Iterator[Metric]:
        """Yield each metric without samples."""
        yield from self._families()

    def collect(self) -> Iterator[Metric]:
        """Yield each metric with its present samples."""
        families = {family.name: family for family in self._families()}
        for name, values, value in self._samples():
            families[name].add_metric(values, value)
        yield from families.values()

    def _families(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        for name, text, *labels in _GAUGES:
            yield GaugeMetricFamily(name, text, labels=labels)
        for name, text, *labels in _COUNTERS:
            yield CounterMetricFamily(name, text, labels=labels)

    def _samples(self) -> "Iterator[_Sample]":
        for part in (self._peers, self._links, self._bytes, self._memory, self._sessions, self._events):
            yield from part()

    def _peers(self) -> "Iterator[_Sample]":
        states = Counter(peer.state.value for peer in self.table.all())
        for state in _STATES:
            yield "meshd_peers", [state], states[state]
        for peer in self.table.linked():
            yield "meshd_peer_info", [peer.id, peer.name, peer.version], 1

    def _links(self) -> "Iterator[_Sample]":
        stats = self.prober.stats()
        for row in self.links.rows():
            peer = row["peer"]
            before = self.links.traffic.before(peer)
            yield "meshd_link_up_seconds", [peer], row["up_s"]
            yield "meshd_link_queued_bytes", [peer], row["queued_bytes"]
            yield "meshd_link_sent_bytes", [peer], before[0] + row["bytes_out"]
            yield "meshd_link_received_bytes", [peer], before[1] + row["bytes_in"]
            if peer in stats:
                yield "meshd_link_round_trip_seconds", [peer], 2 * stats[peer].hop_s
                yield "meshd_link_bandwidth_bytes_per_second", [peer], stats[peer].bandwidth_bytes_s

    def _bytes(self) -> "Iterator[_Sample]":
        traffic = self.links.traffic
        yield "meshd_link_refusals", [], self.links.refusals_total
        yield "meshd_link_restores", [], self.links.restored_total
        for kind in KINDS:
            yield "meshd_sent_payload_bytes", [kind], traffic.sent[kind]
            yield "meshd_received_payload_bytes", [kind], traffic.received[kind]

    def _memory(self) -> "Iterator[_Sample]":
        yield "meshd_memory_total_bytes", [], self.memory_total_bytes
        yield "meshd_memory_free_bytes", [], self.memory.free_bytes()
        yield "meshd_memory_reserved_bytes", [], self.holdings.reserved_bytes
        layers: Counter[tuple[str, str]] = Counter()
        weights: Counter[str] = Counter()
        for resident in self.holdings:
            layers[resident.card.name, resident.state.value] += len(resident.layers)
            weights[resident.card.name] += resident.weight_bytes
        for (model, state), count in layers.items():
            yield "meshd_layers", [model, state], count
        for model, size in weights.items():
            yield "meshd_weights_bytes", [model], size
        loaded = [resident for resident in self.holdings if resident.kv is not None]
        yield "meshd_kv_blocks", [], sum(resident.kv_tokens // PAGE_TOKENS for resident in loaded)
        yield "meshd_kv_blocks_free", [], sum(resident.kv_tokens_free // PAGE_TOKENS for resident in loaded)

    def _sessions(self) -> "Iterator[_Sample]":
        coordinator = self.coordinator
        yield "meshd_sessions_active", [], len(coordinator.answers)
        yield "meshd_sessions_waiting", [], coordinator.admission.waiting
        yield "meshd_sessions_retained", [], len(coordinator.retained)
        yield "meshd_stages_active", [], self.stages.sessions
        yield "meshd_journal_sessions", ["own"], len(self.journal)
        yield "meshd_journal_sessions", ["deputy"], len(self.deputy.store)
        yield "meshd_journal_bytes", [], self.deputy.store.size

    def _events(self) -> "Iterator[_Sample]":
        yield "meshd_events_published", [], self.stream.published
        yield "meshd_events_lost", [], self.stream.lost
        yield "meshd_event_readers", ["client"], self.stream.readers
        yield "meshd_event_readers", ["peer"], self.stream.watchers
        yield "meshd_agent_failures", [], self.supervisor.failures


_Sample = tuple[str, list[str], float]
_GAUGES: tuple[tuple[str, ...], ...] = (
    ("meshd_peers", "Other peers that this peer knows, by their state", "state"),
    ("meshd_peer_info", "Linked peers: the name and version of each id", "peer", "name", "version"),
    ("meshd_link_up_seconds", "Age of the link with a peer", "peer"),
    ("meshd_link_queued_bytes", "Bytes that wait to be sent to a peer", "peer"),
    ("meshd_link_round_trip_seconds", "Usual round trip of a small message", "peer"),
    ("meshd_link_bandwidth_bytes_per_second", "Measured bandwidth to a peer", "peer"),
    ("meshd_memory_total_bytes", "Memory that this peer may use"),
    ("meshd_memory_free_bytes", "Memory that may still be reserved"),
    ("meshd_memory_reserved_bytes", "Memory reserved for weights and KV"),
    ("meshd_layers", "Layers on this peer, by the state of their load", "model", "state"),
    ("meshd_weights_bytes", "Memory of weights", "model"),
    ("meshd_kv_blocks", "KV that placements reserve, in blocks of 32 tokens of all their layers"),
    ("meshd_kv_blocks_free", "Of these, blocks that one more session can have"),
    ("meshd_sessions_active", "Sessions that this peer coordinates"),
    ("meshd_sessions_waiting", "Requests that wait for admission"),
    ("meshd_sessions_retained", "Answers that have ended or are suspended and can still be read"),
    ("meshd_stages_active", "Stages of sessions that run on this peer"),
    ("meshd_journal_sessions", "Sessions of this peer that are journaled, and records that it keeps for others", "role"),
    ("meshd_journal_bytes", "Size of the records that this peer keeps for others"),
    ("meshd_event_readers", "Readers of this peer's events", "kind"),
)
_COUNTERS: tuple[tuple[str, ...], ...] = (
    ("meshd_link_sent_bytes", "Bytes sent to a linked peer, on all links since the start", "peer"),
    ("meshd_link_received_bytes", "Bytes received from a linked peer, on all links since the start", "peer"),
    ("meshd_link_refusals", "Links with other devices that this peer or the other device refused"),
    ("meshd_link_restores", "Links that broke and came back, with all that was on its way"),
    ("meshd_sent_payload_bytes", "Bytes of payloads sent to other peers, by what they carry", "kind"),
    ("meshd_received_payload_bytes", "Bytes of payloads received from other peers, by what they carry", "kind"),
    ("meshd_events_published", "Events of this peer"),
    ("meshd_events_lost", "Events that readers missed because they were too slow"),
    ("meshd_agent_failures", "Failures of agents, each of which was started again"),
)
