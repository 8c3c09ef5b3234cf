"""Decides how much of a prompt is computed beside decode steps, and in which passes.

A chunk reads all KV before it, however short it is: at position 1,800 of SmolLM2-135M, 4 tokens add 32 ms to a pass with 4 decode
steps, and 30 tokens add 136 ms (two AVX2 cores). So a prompt gets a larger chunk in few passes rather than a small one in each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from weakref import WeakKeyDictionary

from meshd.agents.stage.batch.learning import StepLearning
from meshd.agents.stage.steps import ActiveStage
from meshd.kernels.backend import Stage

PREFILL_SHARE = 0.5
"""How much longer decode steps take because of prompts, on average: as a share of their time without. So the time per token rises
to 1.5 times while prompts are computed, which get a third of the time. Where more than half as many prompts wait as there are
sessions that decode, the share is their ratio, so that no session gets less of the processor for being new."""
TURN_PASSES = 11
"""One pass in so many has a chunk of a prompt, if there are decode steps: so nine tokens in ten are not delayed at all."""
LONGEST_WAIT_S = 0.5
"""What a chunk adds to a pass, if possible. On a slow device more passes have a chunk, each a smaller one, and may take longer."""


@dataclass(slots=True)
class PromptPacing:
    """Cuts the prompts of the first stages of this peer."""

    learning: StepLearning
    _passes: WeakKeyDictionary[Stage, int] = field(default_factory=WeakKeyDictionary)
    """Passes since the last one with a chunk that has a budget; without a number, there was none yet."""

    def budget(self, active: ActiveStage, start: int, decodes: int, decoding: Sequence[int], prompts: int) -> int:
        """Return how many tokens of a prompt a pass takes from position `start` on; 0 to leave it to a later pass.

        decodes: number of decode steps in the pass. decoding: the positions of the sessions on the same layers that decode. Those
        without a step in the pass wait for other peers; a step may come at any moment, and the chunk should not delay it much.
        prompts: number of sessions on the same layers whose prompts may be computed now.
        """
        chunk = active.open.plan.prefill_chunk_tokens
        if not decoding:
            return chunk
        position = sum(decoding) // len(decoding)
        pass_s = self.learning.pass_s(active.resident, active.cache.layers, len(decoding), position)
        share = max(PREFILL_SHARE, prompts / len(decoding))
        turn = max(1, min(TURN_PASSES, int(LONGEST_WAIT_S / (share * pass_s)))) if decodes else 1
        passes = self._passes.get(active.stage, TURN_PASSES)
        if passes + 1 < turn:
            return 0
        wait_s = share * pass_s * turn
        read_s, token_s = self.learning.prompt_s(active.resident, active.cache.layers, start)
        least = ceil(read_s / token_s)  # fewer would take less time than to read the KV before them
        return max(1, min(chunk, max(least, int((wait_s - read_s) / token_s))))

    def chosen(self, stage: Stage, *, by_budget: bool) -> None:
        """Count a pass on a stage. `by_budget`: whether it has a chunk that has a budget."""
        if by_budget:
            self._passes[stage] = 0
        elif stage in self._passes:
            self._passes[stage] += 1
