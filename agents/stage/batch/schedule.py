"""Chooses what the compute thread computes next. Pure: no I/O, no clock.

One pass computes the steps of several sessions on the same layers, because it then reads the weights once for all of them.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from meshd.bounds import MAX_BATCH
from meshd.types import SessionId

StageKey = tuple[SessionId, int]
"""A session, and the index of its stage in the plan."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A step that may begin: there is credit for its output."""

    key: StageKey
    layers: Hashable
    """What it computes on. One pass has steps of equal `layers`."""
    tokens: int
    prefill: bool
    """Whether it is a prefill or refill step. Otherwise a decode or verify step."""
    divisible: bool
    """Whether a part of it may begin: the first stage cuts prompts by its own budget, the others take chunks as they come."""
    since: float
    """Monotonic time since when it is ready."""

    @property
    def by_budget(self) -> bool:
        """Whether it is a prompt of which a pass takes as many tokens as its budget allows."""
        return self.prefill and self.divisible and self.tokens > WHOLE_TOKENS


WHOLE_TOKENS = 32
"""A prompt with at most so many tokens left is not cut, and one pass takes several prompts only up to so many tokens: from here on
a pass is bound by arithmetic, so that more prompts in it would only delay the first one."""


@dataclass(frozen=True, slots=True)
class Pick:
    """The first `tokens` tokens of a ready step."""

    key: StageKey
    tokens: int
    by_budget: bool = False


def schedule(ready: Sequence[Ready], budget_of: Callable[[StageKey, int], int]) -> tuple[Pick, ...]:
    """Choose the steps of the next pass: all decode and verify steps, then prefill chunks, oldest first.

    The layers whose oldest step has waited longest are next. Every pass takes all decodes and at least one prefill chunk, if the
    budget allows, so that neither starves. A chunk that the first stage cut is taken whole by the stages after it.

    budget_of: how many tokens of a prompt a pass takes: (its stage, number of decode and verify steps in the pass). At least 1 if
    there are no such steps. 0 leaves the prompt to a later pass.
    Returns: at most `MAX_BATCH` steps, each of another stage; none if none is ready.
    """
    decodes_on = Counter(step.layers for step in ready if not step.prefill)
    due = [
        step
        for step in ready
        if not (step.by_budget and decodes_on[step.layers] and not budget_of(step.key, decodes_on[step.layers]))
    ]
    if not due:
        return ()
    oldest = min(due, key=lambda step: step.since)
    steps = sorted((step for step in due if step.layers == oldest.layers), key=lambda step: step.since)
    chunks = [step for step in steps if step.prefill]
    decodes = [step for step in steps if not step.prefill]
    picks = [Pick(step.key, step.tokens) for step in decodes[: MAX_BATCH - bool(chunks)]]
    if not chunks:
        return tuple(picks)
    first, *others = chunks
    taken = min(first.tokens, budget_of(first.key, len(decodes))) if first.by_budget else first.tokens
    picks.append(Pick(first.key, taken, first.by_budget))
    for step in others[: MAX_BATCH - len(picks)]:
        if taken + step.tokens <= WHOLE_TOKENS:
            picks.append(Pick(step.key, step.tokens))
            taken += step.tokens
    return tuple(picks)
