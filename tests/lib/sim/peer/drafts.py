"""Drafters of random skill at the first stages, and refills: so that the sessions of a run have steps of all four kinds."""

import random
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from meshd.agents.stage.batch.compute import StepOutput
from meshd.agents.stage.flow.events import StageStep
from meshd.agents.stage.flow.session import StageState
from meshd.agents.stage.steps import ActiveStage
from meshd.protocol.messages import Open, StepKind
from meshd.types import SessionId
from sim.toy.mathematics import VOCAB

if TYPE_CHECKING:
    from meshd.agents.stage.host import StageHost

_SKILLS = ("right", "wrong", "partly right", "any")
_REFILLS = 0.2
"""Share of tokens at which a first stage has the next one compute some positions again."""
_LONGEST_REFILL = 48


class Drafts:
    """The drafters of a run. They know the right answers, and guess them well or badly."""

    def __init__(self, rng: random.Random, share: float) -> None:
        """`share`: of the first stages, how many have a drafter."""
        self.truths: dict[SessionId, tuple[int, ...]] = {}
        """The tokens of each session's answer."""
        self.guessed: Counter[str] = Counter()
        """Number of steps with guesses of each skill, and of those that ran ahead of the tokens."""
        self.rng = rng
        self._share = share

    def serve(self, stages: "StageHost") -> None:
        """Give a new peer's first stages their drafters."""
        stages._opener.drafter_of = partial(self._drafter, stages)

    def _drafter(self, stages: "StageHost", message: Open) -> "SimDrafter | None":
        return SimDrafter(self, stages, message) if self.rng.random() < self._share else None


class SimDrafter:
    """Implements `meshd.agents.stage.steps.Drafter` for one stage of one epoch, and sends refills."""

    def __init__(self, drafts: Drafts, stages: "StageHost", message: Open) -> None:
        self._drafts = drafts
        self._stages = stages
        self._open = message
        self._skill = drafts.rng.choice(_SKILLS)
        self._runs_ahead = drafts.rng.random() < 0.5
        self._most = drafts.rng.randint(1, 5)

    def after(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        active = self._active()
        if active is None:
            return ()
        if self._drafts.rng.random() < _REFILLS:
            self._refill(active)
        return self._guesses(active.machine.known_to + len(tokens), "")

    def ahead(self) -> tuple[int, ...]:
        active = self._active()
        return self._guesses(active.machine.due, " ahead") if active is not None and self._runs_ahead else ()

    def _active(self) -> ActiveStage | None:
        active = self._stages._active.get((self._open.session, 0))
        return active if active is not None and active.open.epoch == self._open.epoch else None

    def _guesses(self, position: int, how: str) -> tuple[int, ...]:
        """Guess the tokens from a position on. Positions behind the answer's end are guessed too."""
        index = position - self._open.prompt_tokens
        truth = self._drafts.truths.get(self._open.session, ())
        right = (*truth, *range(1, 1 + self._most))[index : index + self._most]
        skill = self._skill if self._skill != "any" else self._drafts.rng.choice(_SKILLS[:3])
        good = {"right": len(right), "wrong": 0, "partly right": len(right) // 2}[skill]
        if right:
            self._drafts.guessed[skill + how] += 1
        return right[:good] + tuple((token + 1) % VOCAB for token in right[good:])

    def _refill(self, active: ActiveStage) -> None:
        """Have the next stage compute positions again that it has computed. `SimCompute` damages their KV before it does so."""
        machine, log = active.machine, active.cache.log
        if log is None or not machine.output.open or machine.state is not StageState.IDLE:
            return  # in another state, the machine may have planned with this credit
        first, last = log.kept_from, min(log.kept_to, machine.known_to - 1)
        if first >= last:
            return
        start = self._drafts.rng.randrange(first, last)
        end = min(last, start + _LONGEST_REFILL)
        step = StageStep(start, end - start, StepKind.REFILL)
        sent = machine.output.add(step, StepOutput(log.rows(start, end)))
        self._stages._runner.sender.deliver(active, sent)
