"""Predict time, traffic and memory of given stages with the formulas of `cost` and `memory`."""

from itertools import pairwise

import msgspec
import numpy as np

from meshd.planner.model import cost
from meshd.planner.model.memory import MemoryUse, capacity_bytes, shard_kv_bytes, stage_memory
from meshd.planner.model.tables import mean_chunk_start
from meshd.planner.problem import PlanInput
from meshd.planner.profile import PeerProfile
from meshd.types import LayerRange, PeerId, StagePlan


class StageEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """Predicted times of one stage: for one token of decoding, and for one prefill chunk."""

    peer: PeerId
    name: str
    layers: LayerRange
    project_s: tuple[float, ...]
    """Seconds in each layer for norm, q, k and v."""
    attend_s: tuple[float, ...]
    """Seconds in each layer for attention, round trips to shards included."""
    mix_s: tuple[float, ...]
    """Seconds in each layer for output projection and MLP."""
    head_s: float
    """Seconds for final norm, head and sampler; 0 except on the last stage."""
    overhead_s: float
    """Seconds of a step beside its computation."""
    prefill_chunk_s: float
    """Seconds of one prefill chunk, overhead included."""
    energy_j: float | None
    """Energy for one token. None: the peer's power was not measured."""
    decode_factor: float
    """Correction that the times of decoding contain: measured over predicted time of the peer's recent steps."""
    prefill_factor: float

    @property
    def decode_s(self) -> float:
        return sum(self.project_s) + sum(self.attend_s) + sum(self.mix_s) + self.head_s + self.overhead_s


class HopEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """Predicted times of messages from one peer to another."""

    source: PeerId
    target: PeerId
    bytes_per_token: int
    decode_s: float
    prefill_chunk_s: float
    """Seconds for the hidden states of one prefill chunk; 0 for the hop that returns the token to the first stage."""
    link: str
    """Where the figures of the link come from; see `Link.source`."""


class PeerMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Memory that a plan takes on one peer."""

    peer: PeerId
    use: MemoryUse
    capacity_bytes: int

    @property
    def share(self) -> float:
        return self.use.total_bytes / max(1, self.capacity_bytes)


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """The predictions for one plan."""

    stages: tuple[StageEstimate, ...]
    hops: tuple[HopEstimate, ...]
    """The hops between consecutive stages."""
    back: HopEstimate
    """The hop that returns the token from the last stage to the first."""
    memory: tuple[PeerMemory, ...]
    tpot_s: float
    ttft_s: float
    period_s: float
    """Time per token with many requests in flight: the time of the slowest stage or link."""
    energy_j: float | None
    """Energy for one token: the sum of power times time over all stages and hops. A hop counts the power of its sender.

    None: the power of a peer was not measured.
    """

    @property
    def memory_share(self) -> float:
        """Share of its capacity that the fullest peer uses."""
        return max(peer.share for peer in self.memory)


def estimate(problem: PlanInput, stages: tuple[StagePlan, ...]) -> Estimate:
    """Predict time, traffic and memory of these stages and their attention shards. Raises: NoPeer if a peer has no profile."""
    _, chunks = cost.chunking(problem.prompt_tokens, problem.chunk_tokens)
    parts = tuple(_stage(problem, stage) for stage in stages)
    hops = tuple(_hop(problem, one.peer, other.peer) for one, other in pairwise(stages))
    back = _back(problem, stages[-1].peer, stages[0].peer)
    decode = [part.decode_s for part in parts] + [hop.decode_s for hop in (*hops, back)]
    prefill = [part.prefill_chunk_s for part in parts] + [hop.prefill_chunk_s for hop in hops]
    return Estimate(
        stages=parts,
        hops=hops,
        back=back,
        memory=peer_memory(problem, stages),
        tpot_s=sum(decode),
        ttft_s=cost.pipelined_s([*prefill, parts[-1].head_s], prefill, chunks),
        period_s=max(decode),
        energy_j=_energy(problem, parts, (*hops, back)),
    )


def peer_memory(problem: PlanInput, stages: tuple[StagePlan, ...]) -> tuple[PeerMemory, ...]:
    """Predict the memory that these stages take on each peer, in their order. Peers with only attention shards are included."""
    use: dict[PeerId, MemoryUse] = {}
    for stage in stages:
        use[stage.peer] = use.get(stage.peer, MemoryUse()) + stage_memory(problem, stage)
        for shard in stage.attention:
            if shard.peer != stage.peer:
                use[shard.peer] = use.get(shard.peer, MemoryUse()) + MemoryUse(kv_bytes=shard_kv_bytes(problem, shard))
    return tuple(
        PeerMemory(peer=peer, use=used, capacity_bytes=capacity_bytes(problem, problem.profile(peer))) for peer, used in use.items()
    )


def _stage(problem: PlanInput, stage: StagePlan) -> StageEstimate:
    card, profile = problem.card, problem.profile(stage.peer)
    layers = cost.layer_decode_s(profile, card)[stage.layers.start : stage.layers.end]
    share = cost.project_share(card.spec)
    part = StageEstimate(
        peer=stage.peer,
        name=profile.name,
        layers=stage.layers,
        project_s=tuple((layers * share).tolist()),
        attend_s=tuple(_attend_s(problem, stage, profile, layer) for layer in stage.layers),
        mix_s=tuple((layers * (1 - share)).tolist()),
        head_s=cost.head_s(profile, card) if stage.layers.end == card.spec.layers else 0.0,
        overhead_s=profile.step_overhead_s,
        prefill_chunk_s=_prefill_chunk_s(problem, stage, profile),
        energy_j=None,
        decode_factor=profile.decode_factor,
        prefill_factor=profile.prefill_factor,
    )
    if profile.power_w is None:
        return part
    return msgspec.structs.replace(part, energy_j=part.decode_s * profile.power_w)


def _attend_s(problem: PlanInput, stage: StagePlan, owner: PeerProfile, layer: int) -> float:
    """Predict one layer's attention in seconds. Shards work in parallel, so the slowest one counts."""
    shards = [shard for shard in stage.attention if layer in shard.layers]
    if not shards:
        return cost.attention_decode_s(owner, problem.position, problem.kv_token_layer_bytes)
    return max(
        cost.shard_decode_s(
            shard,
            owner,
            problem.profile(shard.peer),
            problem.network,
            problem.card.spec,
            problem.position,
            problem.kv_token_layer_bytes,
            problem.wire_element_bytes,
        )
        for shard in shards
    )


def _prefill_chunk_s(problem: PlanInput, stage: StagePlan, profile: PeerProfile) -> float:
    tokens, chunks = cost.chunking(problem.prompt_tokens, problem.chunk_tokens)
    layers = cost.layer_prefill_s(profile, problem.card, tokens, mean_chunk_start(tokens, chunks))
    return float(np.sum(layers[stage.layers.start : stage.layers.end])) + profile.step_overhead_s


def _hop(problem: PlanInput, source: PeerId, target: PeerId) -> HopEstimate:
    tokens, _ = cost.chunking(problem.prompt_tokens, problem.chunk_tokens)
    link, size = problem.network.link(source, target), problem.activation_bytes
    return HopEstimate(
        source=source,
        target=target,
        bytes_per_token=size,
        decode_s=link.hop_s(size),
        prefill_chunk_s=link.hop_s(size * tokens),
        link=link.source,
    )


def _back(problem: PlanInput, source: PeerId, target: PeerId) -> HopEstimate:
    link, size = problem.network.link(source, target), cost.TOKEN_MESSAGE_BYTES
    return HopEstimate(
        source=source, target=target, bytes_per_token=size, decode_s=link.hop_s(size), prefill_chunk_s=0.0, link=link.source
    )


def _energy(problem: PlanInput, parts: tuple[StageEstimate, ...], hops: tuple[HopEstimate, ...]) -> float | None:
    terms = [part.energy_j for part in parts]
    for hop in hops:
        power = problem.profile(hop.source).power_w
        terms.append(None if power is None else power * hop.decode_s)
    known = [term for term in terms if term is not None]
    return sum(known) if len(known) == len(terms) else None
