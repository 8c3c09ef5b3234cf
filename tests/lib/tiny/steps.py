"""Runs stages as a session does: prefill in chunks, then decode, with the activations passed from stage to stage."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from meshd.kernels.backend import Segment, Stage
from meshd.kernels.kv import BlockTable, KVPool
from meshd.types import ModelSpec

F32 = npt.NDArray[np.float32]
CAPACITY = 256


@dataclass
class Chain:
    """Consecutive stages, each with its own KV pool."""

    stages: Sequence[Stage]
    pools: list[KVPool]
    tables: list[BlockTable]

    @classmethod
    def of(cls, spec: ModelSpec, stages: Sequence[Stage]) -> "Chain":
        pools = [KVPool(spec, stage.layers, blocks=2 * CAPACITY // 32) for stage in stages]
        return cls(stages, pools, [pool.allocate(CAPACITY) for pool in pools])

    def step(self, ids: Sequence[int], start: int) -> F32:
        """Compute one step. Each stage gets read-only bytes, as from the network. Returns: hidden states after the last layer."""
        hidden = self.stages[0].embed(np.asarray(ids, np.int32))
        for stage, pool, table in zip(self.stages, self.pools, self.tables, strict=True):
            received = np.frombuffer(hidden.tobytes(), np.float32).reshape(hidden.shape)
            hidden = stage.forward(received, [Segment(table, start, len(ids))], pool)
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
