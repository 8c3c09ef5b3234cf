"""What the agents of a peer are composed from: a real device and network, or simulated ones."""

from collections.abc import Callable
from dataclasses import dataclass, field

from meshd.agents.device.compute import ComputeQueue
from meshd.agents.device.sensors import DeviceSensors
from meshd.agents.links.links import Links
from meshd.agents.links.open import DialOutcome
from meshd.agents.links.probe import LinkProber
from meshd.agents.membership.fleet.devices import DeviceList
from meshd.agents.membership.peer_table import PeerTable
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.ready.layer_times import LayerTimesFile
from meshd.agents.placement.restart.placements import Placements
from meshd.agents.placement.weights.provider import WeightProvider
from meshd.agents.session.coordinator import Coordinator
from meshd.agents.session.plan.route import Router
from meshd.agents.signals import Signal
from meshd.agents.supervisor import Supervisor
from meshd.agents.trust.trust import Trust
from meshd.clock import Clock
from meshd.kernels.backend import Backend
from meshd.models.store.progress import PullProgress
from meshd.protocol.messages import Hello
from meshd.telemetry import Telemetry
from meshd.types import Advert, Capability, PeerId, SessionId


@dataclass(frozen=True, slots=True)
class PeerSignals:
    """Signals that connect an agent to agents that are constructed after it."""

    link_up: Signal[PeerId, Hello, tuple[str, int]] = field(default_factory=Signal)
    link_down: Signal[PeerId, str] = field(default_factory=Signal)
    dialled: Signal[DialOutcome] = field(default_factory=Signal)
    """What a dial showed, or why another device's connection made no link."""
    peer_gone: Signal[PeerId, str] = field(default_factory=Signal)
    """A peer's link is down, and the peer table already has this change."""
    advert_received: Signal[Advert] = field(default_factory=Signal)
    changed: Signal[()] = field(default_factory=Signal[()])
    """Something in this peer's advert changed."""
    sessions_changed: Signal[()] = field(default_factory=Signal[()])
    """A stage session opened or closed on this peer."""
    layers_changed: Signal[()] = field(default_factory=Signal[()])
    """Layers were loaded or freed on this peer."""
    pull_progress: Signal[PullProgress] = field(default_factory=Signal)
    """A step of a pull of a model to this peer's disk."""
    orphaned: Signal[SessionId, PeerId] = field(default_factory=Signal)
    """The coordinator of a session is gone, and this peer has the session's record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSettings:
    """The settings that agents need, and the limits of a peer's queues."""

    models: tuple[str, ...] = ()
    """References of the models to place at the start."""
    mirror: bool = False
    copies: int
    """Number of copies of each layer that the keeper maintains in the cluster."""
    max_sessions: int
    queue_limit: int
    queue_wait_s: float
    outputs_limit_bytes: int
    """Memory for stage outputs that are kept in case they must be sent again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a peer's agents are composed from. The simulator passes a simulated device, network and storage."""

    me: PeerId
    name: str
    version: str
    incarnation: int
    settings: PeerSettings
    signals: PeerSignals
    """`links`, `prober` and `library` must have been constructed with the same signals."""
    clock: Clock
    telemetry: Telemetry
    capability: Capability
    """This device's capability, measured when the daemon starts."""
    measure_free_bytes: Callable[[], int]
    """Measures the free memory, in bytes."""
    backend: Backend
    compute: ComputeQueue
    links: Links
    prober: LinkProber
    table: PeerTable
    library: ModelLibrary
    weights: WeightProvider
    devices: DeviceList
    """The devices that may send jobs over MQTT."""
    placements: Placements
    """What was placed on this peer when it last ran."""
    layer_times: LayerTimesFile
    """What was measured of layers when they were loaded before."""
    trust: Trust
    supervisor: Supervisor
    sensors: DeviceSensors | None = None
    """None: what the device shows of itself is not read."""
    router: type[Router] = Router
    coordinator: type[Coordinator] = Coordinator
