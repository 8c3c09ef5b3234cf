"""Predict how long a session pauses when its plan changes.

Times come from the formulas of `cost`. The stages recompute missing KV in a pipeline of chunks, as in Pipette (Yim et al., 2024).
Each stage may have a different number of positions to recompute.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from meshd.planner.model import cost
from meshd.planner.model.cost import Seconds
from meshd.planner.model.tables import mean_chunk_start
from meshd.planner.problem import PlanInput
from meshd.planner.profile import PeerProfile
from meshd.types import PeerId, StagePlan

CONTROL_BYTES = 1024
"""Size assumed for each of the messages OPEN, OPENED and RESUME."""
_CONTROL_HOPS = 3
"""Number of messages to and from each stage: OPEN to the stage, OPENED back, and RESUME or STEPS to the stage."""


def compute_s(problem: PlanInput, profile: PeerProfile, first: int, last: int) -> Seconds:
    """Predict the time of each layer to compute positions `[first, last)`: in prefill chunks, or one position in a decode step.

    Returns: seconds, `[layers]`.
    """
    tokens = last - first
    if tokens <= 0:
        return np.zeros(problem.card.spec.layers)
    if tokens == 1:
        return cost.layer_decode_s(profile, problem.card) + cost.attention_decode_s(profile, last, problem.kv_token_layer_bytes)
    chunk, chunks = cost.chunking(tokens, problem.chunk_tokens)
    return cost.layer_prefill_s(profile, problem.card, chunk, first + mean_chunk_start(chunk, chunks)) * chunks


def pause_s(problem: PlanInput, stages: Sequence[StagePlan], starts: Sequence[int], known: int, coordinator: PeerId) -> float:
    """Predict the seconds from the choice of a plan to its first token.

    Each stage computes the positions from its item of `starts` up to `known`, the number of tokens known so far. A stage receives
    its input from the stage before it, and all stages work in parallel. So the first chunk takes the sum of the times of all stages
    and links, and the remaining chunks take as long as the slowest stage or link.
    """
    first_chunks: list[float] = []
    wholes: list[float] = []
    for stage, start in zip(stages, starts, strict=True):
        profile, span = problem.profile(stage.peer), slice(stage.layers.start, stage.layers.end)
        end = min(known, start + problem.chunk_tokens)
        _, chunks = cost.chunking(known - start, problem.chunk_tokens)
        first_chunks.append(float(compute_s(problem, profile, start, end)[span].sum()) + profile.step_overhead_s)
        wholes.append(float(compute_s(problem, profile, start, known)[span].sum()) + chunks * profile.step_overhead_s)
    for (one, other), start in zip(pairwise(stages), starts[1:], strict=True):
        link, size = problem.network.link(one.peer, other.peer), problem.activation_bytes
        first_chunks.append(link.hop_s(size * min(problem.chunk_tokens, known - start)))
        wholes.append(link.hop_s(size * (known - start)))
    rest = max(whole - first for whole, first in zip(wholes, first_chunks, strict=True))
    head = cost.head_s(problem.profile(stages[-1].peer), problem.card)
    return opening_s(problem, stages, coordinator) + sum(first_chunks) + max(0.0, rest) + head


def opening_s(problem: PlanInput, stages: Sequence[StagePlan], coordinator: PeerId) -> float:
    """Predict the seconds to open all stages and to send them the prompt or RESUME, and the first token to the coordinator."""
    network = problem.network
    farthest = max(network.hop_s(coordinator, stage.peer, CONTROL_BYTES) for stage in stages)
    return _CONTROL_HOPS * farthest + network.hop_s(stages[-1].peer, coordinator, cost.TOKEN_MESSAGE_BYTES)
