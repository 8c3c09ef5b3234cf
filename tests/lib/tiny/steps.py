"""Runs stages as a session does: prefill in chunks, then decode, with the activations passed from stage to stage."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from meshd.kernels.backend import Segment, Stage
from meshd.kernels.kv.lease import HostLease
from meshd.types import ModelSpec
from tiny.kv import make_lease

F32 = npt.NDArray[np.float32]
CAPACITY = 256


@dataclass
class Chain:
    """Consecutive stages, each with its own KV."""

    stages: Sequence[Stage]
    leases: list[HostLease]

    @classmethod
    def of(cls, spec: ModelSpec, stages: Sequence[Stage]) -> "Chain":
        return cls(stages, [make_lease(spec, stage.layers, CAPACITY) for stage in stages])

    def step(self, ids: Sequence[int], start: int) -> F32:
        """Compute one step. Each stage gets read-only bytes, as from the network. Returns: hidden states after the last layer."""
        hidden = self.stages[0].embed(np.asarray(ids, np.int32))
        for stage, lease in zip(self.stages, self.leases, strict=True):
            received = np.frombuffer(hidden.tobytes(), np.float32).reshape(hidden.shape)
            hidden = stage.forward(received, [Segment(lease, start, len(ids))])
        return hidden

    def run(self, ids: Sequence[int], chunks: Sequence[int]) -> F32:
        """Compute steps of the given sizes. Returns: the hidden states of all steps."""
        parts, start = [], 0
        for size in chunks:
            parts.append(self.step(ids[start : start + size], start))
            start += size
        return np.concatenate(parts)

    def logits(self, hidden: F32) -> F32:
        return self.stages[-1].logits(hidden)

    def greedy(self, prompt: Sequence[int], count: int, chunk: int = CAPACITY) -> list[int]:
        """Decode `count` tokens after a prompt, which is computed in chunks of `chunk` tokens."""
        sizes = [len(prompt[i : i + chunk]) for i in range(0, len(prompt), chunk)]
        hidden, answer = self.run(prompt, sizes), []
        while len(answer) < count:
            answer.append(int(self.logits(hidden[-1:])[0].argmax()))
            hidden = self.step(answer[-1:], len(prompt) + len(answer) - 1)
        return answer
