"""Builds planning problems: model cards, peers, holdings and networks with realistic sizes."""

import random
from collections.abc import Sequence
from typing import Any

from meshd.numerics import UNKNOWN, NumericsId, numerics_id
from meshd.planner.network import Network
from meshd.planner.problem import PlanInput
from meshd.planner.profile import PeerProfile
from meshd.types import Advert, Capability, Holding, LayerRange, LinkStats, ModelCard, ModelId, ModelSpec, PeerId, Rates

MODEL = ModelId("5a" * 16)
PROMISED = numerics_id("onnxruntime", "int8", 512, "a1" * 8, batch_invariant=True)
OTHER = numerics_id("native", "int8", 512, "b2" * 8, batch_invariant=True)
UNPROMISED = numerics_id("torch", "f32", 512, "c3" * 8, batch_invariant=False)
"""Three numerics ids."""


def make_card(layers: int = 30, *, layer_bytes: Sequence[int] | None = None, tied: bool = True) -> ModelCard:
    """Build the card of a model with the sizes of SmolLM2-135M and this number of layers."""
    spec = ModelSpec(
        architecture="llama",
        layers=layers,
        hidden=576,
        heads=9,
        kv_heads=3,
        head_dim=64,
        ffn=1536,
        vocab=49152,
        context_length=8192,
        rope_theta=100_000.0,
        norm_eps=1e-5,
        tied_head=tied,
    )
    sizes = tuple(layer_bytes or [2_212_000] * layers)
    return ModelCard(
        id=MODEL,
        name="tiny",
        ref="file:/tiny.gguf",
        quantisation="Q4_1",
        spec=spec,
        layer_bytes=sizes,
        embedding_bytes=17_694_720,
        head_bytes=17_697_024,
        layer_parameters=(3_540_096,) * layers,
        head_parameters=49152 * 576,
        end_of_sequence=(2,),
    )


def make_peer(
    name: str,
    *,
    decode_gb_s: float = 10.0,
    memory: int = 4 << 30,
    power_w: float | None = 10.0,
    prefill_gflops: float = 100.0,
    attention_gb_s: float = 5.0,
    overhead_s: float = 20e-6,
    step_overhead_s: float = 50e-6,
    holdings: tuple[Holding, ...] = (),
    roles: tuple[str, ...] = ("compute", "attention", "storage"),
    draining: bool = False,
    numerics: NumericsId = UNKNOWN,
    weight_bits: dict[str, float] | None = None,
) -> PeerProfile:
    rates = Rates(
        decode_bytes_s=decode_gb_s * 1e9,
        prefill_flops_s=prefill_gflops * 1e9,
        memory_bytes_s=decode_gb_s * 1.5e9,
        attention_bytes_s=attention_gb_s * 1e9,
        disk_bytes_s=1e9,
        layer_overhead_s=overhead_s,
    )
    return PeerProfile(
        id=PeerId(f"{name}-id"),
        name=name,
        rates=rates,
        memory_free_bytes=memory,
        power_w=power_w,
        holdings=holdings,
        roles=roles,
        step_overhead_s=step_overhead_s,
        draining=draining,
        numerics=numerics,
        weight_bits=weight_bits or {},
    )


def make_holding(
    start: int,
    end: int,
    *,
    kv_tokens: int = 4096,
    free: int | None = None,
    state: str = "active",
    standby: bool = False,
    **measured: float,
) -> Holding:
    return Holding(
        model=MODEL,
        layers=LayerRange(start, end),
        state=state,
        weight_bytes=(end - start) * 2_212_000,
        kv_tokens_total=kv_tokens,
        kv_tokens_free=kv_tokens if free is None else free,
        standby=standby,
        **measured,
    )


def make_network(peers: Sequence[PeerProfile], *, hop_s: float = 100e-6, bandwidth: float = 1.25e8) -> Network:
    """Build a network in which every pair of peers has the same measurements."""
    stats = LinkStats(rtt_s=2 * hop_s, bandwidth_bytes_s=bandwidth, hop_s=hop_s)
    return Network({(one.id, other.id): stats for one in peers for other in peers if one != other})


def make_problem(
    *peers: PeerProfile, card: ModelCard | None = None, network: Network | None = None, context: int = 512, **fields: Any
) -> PlanInput:
    return PlanInput(
        card=card or make_card(),
        profiles=peers,
        network=network or make_network(peers),
        context=context,
        **fields,
    )


def make_advert(
    peer: PeerProfile,
    others: Sequence[PeerProfile] = (),
    *,
    stored: bool = True,
    card: ModelCard | None = None,
    hop_s: float = 100e-6,
    bandwidth: float = 1.25e8,
) -> Advert:
    """Build the advert of this peer, with the same measurements for its links to all `others`."""
    stats = LinkStats(rtt_s=2 * hop_s, bandwidth_bytes_s=bandwidth, hop_s=hop_s)
    return Advert(
        peer=peer.id,
        name=peer.name,
        incarnation=1,
        revision=1,
        version="0",
        capability=Capability(
            backend="none",
            numerics=peer.numerics,
            processor="none",
            threads=peer.threads,
            memory_total_bytes=8 << 30,
            memory_free_bytes=peer.memory_free_bytes,
            rates=peer.rates,
            roles=peer.roles,
            power_w=peer.power_w,
            weight_bits=peer.weight_bits,
        ),
        holdings=peer.holdings,
        models=(card or make_card(),) if stored else (),
        links={other.id: stats for other in others if other.id != peer.id},
        draining=peer.draining,
    )


def make_adverts(*peers: PeerProfile, **fields: Any) -> list[Advert]:
    """Build the adverts of peers that are all linked with each other."""
    return [make_advert(peer, peers, **fields) for peer in peers]


def random_links(rng: random.Random, peers: Sequence[PeerProfile], *, measured: float = 1.0) -> Network:
    """Draw asymmetric links from gigabit Ethernet to poor Wi-Fi. Only the share `measured` of the pairs has measurements."""
    return Network(
        {
            (one.id, other.id): LinkStats(
                rtt_s=10 ** rng.uniform(-4, -1.5),
                bandwidth_bytes_s=10 ** rng.uniform(6, 9),
                hop_s=rng.choice([0.0, 10 ** rng.uniform(-4.3, -2)]),
            )
            for one in peers
            for other in peers
            if one != other and rng.random() < measured
        }
    )


def random_problem(rng: random.Random, peers: int, layers: int) -> PlanInput:
    """Draw a problem with unequal peers, asymmetric and partly unmeasured links, and often too little memory."""
    card = make_card(layers, layer_bytes=[rng.randrange(1, 40) << 20 for _ in range(layers)], tied=rng.random() < 0.5)
    needed_bytes = sum(card.layer_bytes) + (140 << 20)
    profiles = tuple(_random_peer(rng, index, layers, needed_bytes) for index in range(peers))
    named = tuple(profile.id for profile in profiles if rng.random() < 0.8) if rng.random() < 0.2 else None
    return PlanInput(
        card=card,
        profiles=profiles,
        network=random_links(rng, profiles, measured=0.9),
        context=rng.choice([64, 512, 4096]),
        prompt_tokens=rng.choice([1, 50, 128, 300, 2000]),
        min_peers=rng.choice([1, 1, 1, 2, 3]),
        peers=named or None,
        resident_only=rng.random() < 0.2,
    )


def _random_peer(rng: random.Random, index: int, layers: int, needed_bytes: int) -> PeerProfile:
    holdings = []
    if rng.random() < 0.6:
        start = rng.choice([0, rng.randrange(layers)])
        end = rng.choice([layers, rng.randrange(start + 1, layers + 1)])
        measured = {"layer_decode_s": 10 ** rng.uniform(-4, -2)} if rng.random() < 0.5 else {}
        if rng.random() < 0.3:
            measured |= {"layer_prefill_s": 10 ** rng.uniform(-5, -3), "head_s": 10 ** rng.uniform(-4, -2)}
        holdings.append(make_holding(start, end, kv_tokens=rng.choice([256, 8192]), **measured))
    return make_peer(
        f"p{index}",
        decode_gb_s=10 ** rng.uniform(0, 2),
        memory=int(needed_bytes * rng.uniform(0.2, 1.6)),
        power_w=rng.uniform(3, 100),
        prefill_gflops=10 ** rng.uniform(1, 3),
        attention_gb_s=10 ** rng.uniform(0, 1.5),
        overhead_s=10 ** rng.uniform(-5, -3.5),
        holdings=tuple(holdings),
    )
