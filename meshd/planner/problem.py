"""The planner's input: one planning problem."""

from collections.abc import Sequence

import msgspec

from meshd.errors import NoPeer
from meshd.numerics import NumericsId
from meshd.planner.network import Network
from meshd.planner.profile import PREFILL_CHUNK_TOKENS, PeerProfile
from meshd.types import LayerRange, ModelCard, Objective, PeerId, StagePlan


class PlanInput(msgspec.Struct, frozen=True, kw_only=True):
    """A planning problem: everything that the plan depends on."""

    card: ModelCard
    profiles: tuple[PeerProfile, ...]
    network: Network
    context: int
    """Number of tokens that KV is reserved for."""
    objective: Objective = Objective.LATENCY
    prompt_tokens: int = 128
    """Length of the request's prompt, or an estimate of it."""
    min_peers: int = 1
    peers: tuple[PeerId, ...] | None = None
    """Peers that may take part. None: all."""
    stages: tuple[StagePlan, ...] | None = None
    """Stages to use as they are: they are checked and their times predicted, without a search. None: search for stages."""
    resident_only: bool = False
    """True: route only over layers that are resident now. False: place layers anywhere."""
    max_ttft_s: float | None = None
    max_tpot_s: float | None = None
    chunk_tokens: int = PREFILL_CHUNK_TOKENS
    kv_element_bytes: int = 4
    wire_element_bytes: int = 4

    def __post_init__(self) -> None:
        """Leave out the holdings of layers that the model does not have: a peer may advertise anything."""
        if any(holding.layers not in self.card.layers for profile in self.profiles for holding in profile.holdings):
            profiles = tuple(_within(profile, self.card.layers) for profile in self.profiles)
            msgspec.structs.force_setattr(self, "profiles", profiles)

    @property
    def position(self) -> int:
        """Mean number of tokens that a decode step attends to if the answer fills the context."""
        return (min(self.prompt_tokens, self.context) + self.context) // 2

    @property
    def kv_token_layer_bytes(self) -> int:
        """Bytes of K and V of one token in one layer."""
        return self.card.kv_bytes_per_token_layer(self.kv_element_bytes)

    @property
    def activation_bytes(self) -> int:
        """Bytes of one token's hidden state on the wire."""
        return self.card.hidden_bytes_per_token(self.wire_element_bytes)

    def numerics(self, stages: Sequence[StagePlan]) -> tuple[NumericsId, ...]:
        """Return the id of each stage's peer, in order. Raises: NoPeer."""
        return tuple(self.profile(stage.peer).numerics for stage in stages)

    def profile(self, peer: PeerId) -> PeerProfile:
        """Return the profile of a peer. Raises: NoPeer."""
        for profile in self.profiles:
            if profile.id == peer:
                return profile
        raise NoPeer(f"peer {peer[:8]} is not in the cluster now", hint="see `meshd status`")


def _within(profile: PeerProfile, layers: LayerRange) -> PeerProfile:
    holdings = tuple(holding for holding in profile.holdings if holding.layers in layers)
    return profile if len(holdings) == len(profile.holdings) else msgspec.structs.replace(profile, holdings=holdings)
