"""Makes the parts of this device's peer: its links, disk, memory, models and files, with the settings that they need."""

import msgspec

from meshd import __version__
from meshd.agents.device.compute import ComputeThread
from meshd.agents.device.descriptors import DescriptorShares
from meshd.agents.device.memory import measure_memory
from meshd.agents.device.probe import ProbeResult
from meshd.agents.device.sensors import DeviceSensors
from meshd.agents.links.links import Links, LinkSettings
from meshd.agents.links.probe import LinkProber
from meshd.agents.membership.fleet.devices import DeviceList
from meshd.agents.membership.peer_table import PeerTable
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.ready.layer_times import LayerTimesFile
from meshd.agents.placement.restart.placements import Placements
from meshd.agents.placement.weights.headers import HeaderFetcher
from meshd.agents.placement.weights.provider import WeightProvider
from meshd.agents.placement.weights.sources import WeightSources
from meshd.agents.supervisor import Supervisor
from meshd.agents.text.model_texts import ModelTexts
from meshd.agents.text.workers import TextWorkers, memory_limit
from meshd.agents.trust.files import StateFiles, load_exclusion
from meshd.agents.trust.known_peers import KnownPeers
from meshd.agents.trust.trust import Trust
from meshd.clock import Clock
from meshd.config import Config
from meshd.daemon.sockets import Sockets
from meshd.kernels.registry import make_backend
from meshd.kernels.weights.footprint import weight_bits
from meshd.models.store.store import Store
from meshd.peer.parts import Parts, PeerSettings, PeerSignals
from meshd.protocol import transport
from meshd.protocol.identity import Identity, load_trust
from meshd.state import StateFolder
from meshd.telemetry import Telemetry

_QUEUE_WAIT_S = 60.0
"""Longest time that a request waits for a place among the running sessions."""
_OUTPUTS_BYTES = 128 << 20
"""Memory for stage outputs that are kept in case they must be sent again."""


def device_parts(
    config: Config,
    identity: Identity,
    measured: ProbeResult,
    clock: Clock,
    telemetry: Telemetry,
    sockets: Sockets,
    shares: DescriptorShares,
) -> Parts:
    """Make the parts of this device's peer."""
    backend = make_backend(measured.capability.backend, measured.capability.threads)
    capability = msgspec.structs.replace(measured.capability, weight_bits=weight_bits(backend.memory_bytes))
    folder, signals, table = StateFolder.open(config.state), PeerSignals(), PeerTable()
    incarnation = int.from_bytes(clock.random_bytes(8), "big") >> 1
    settings = _link_settings(config, sockets, shares)
    peer_links = _links(identity, config.name, incarnation, settings, clock, signals)
    prober = LinkProber(
        peer_links, clock, on_change=signals.changed, on_round_trip=lambda peer, seconds: telemetry.hop(peer, seconds / 2)
    )
    weight_sources = WeightSources(
        me=identity.peer, links=peer_links, adverts=table.adverts, names=table.name_of, clock=clock, link_stats=prober.stats
    )
    library = ModelLibrary(
        links=peer_links,
        store=Store(config.models_dir, config.hf_cache, index_url=config.pypi_index, clock=clock),
        adverts=table.adverts,
        on_change=signals.changed,
        on_pull=signals.pull_progress,
        clock=clock,
        headers=HeaderFetcher(peer_links, weight_sources),
        texts=ModelTexts(TextWorkers(memory_bytes=memory_limit(capability.memory_total_bytes))),
    )
    return Parts(
        me=identity.peer,
        name=config.name,
        version=__version__,
        incarnation=incarnation,
        settings=_peer_settings(config),
        signals=signals,
        clock=clock,
        telemetry=telemetry,
        capability=capability,
        measure_free_bytes=lambda: measure_memory().free_bytes,
        backend=backend,
        compute=ComputeThread(),
        links=peer_links,
        prober=prober,
        table=table,
        library=library,
        weights=WeightProvider(peer_links, library, weight_sources, clock),
        devices=DeviceList(peer_links, folder),
        placements=Placements(folder),
        layer_times=LayerTimesFile(StateFolder(config.cache)),
        trust=_trust(folder, identity, clock),
        supervisor=Supervisor(clock),
        sensors=DeviceSensors(clock),
    )


def _peer_settings(config: Config) -> PeerSettings:
    return PeerSettings(
        models=config.models,
        mirror=config.mirror,
        copies=config.copies,
        max_sessions=config.max_sessions,
        queue_limit=config.queue_limit,
        queue_wait_s=_QUEUE_WAIT_S,
        outputs_limit_bytes=_OUTPUTS_BYTES,
    )


def _links(identity: Identity, name: str, incarnation: int, settings: LinkSettings, clock: Clock, signals: PeerSignals) -> Links:
    return Links(
        identity,
        name,
        incarnation,
        settings,
        clock,
        on_up=signals.link_up,
        on_down=signals.link_down,
        on_outcome=signals.dialled,
    )


def _link_settings(config: Config, sockets: Sockets, shares: DescriptorShares) -> LinkSettings:
    return LinkSettings(
        host=config.link.host,
        port=config.link.port,
        sockets=tuple(sockets.link),
        max_links=shares.links,
        max_half_open=shares.half_open,
        slow_start=transport.has_slow_start(),
    )


def _trust(folder: StateFolder, identity: Identity, clock: Clock) -> Trust:
    stored = load_trust(folder)
    assert stored is not None, "the identity was made from the stored key"
    key, chain = stored
    return Trust(
        identity.peer, key, chain, StateFiles(folder, clock), KnownPeers(folder, clock), exclusion=load_exclusion(folder, key)
    )
