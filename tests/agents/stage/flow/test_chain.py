"""Chains of one to three stages over a network that reorders between lanes: with any guesses, losses of an epoch and any schedule,
the tokens are those of a computation without all that.

The model of this test is a rolling hash: a stage's output at a position depends on all its inputs up to there, so a stale position,
a lost step or a wrong order gives other tokens.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from meshd.agents.stage.flow import events as fsm
from meshd.agents.stage.flow.events import StageStep
from meshd.agents.stage.flow.session import StageSession, StageState
from meshd.protocol.messages import Lane, StepKind

VOCAB = 3  # so that some random guesses are right
COORDINATOR = -1


def mixed(before: int, value: int) -> int:
    return (before * 1_000_003 + value * 7919 + 12345) % (1 << 61)


def sampled(row: int) -> int:
    return (row >> 20) % VOCAB


def undisturbed(prompt: list[int], answer: int, stages: int) -> list[int]:
    """Returns: the answer, computed one token at a time."""
    state, tokens = [0] * stages, list(prompt)
    for position in range(len(prompt) + answer):
        row = tokens[position]
        for stage in range(stages):
            row = state[stage] = mixed(state[stage], row)
        if position + 1 >= len(prompt):
            tokens.append(sampled(row))
    return tokens[len(prompt) : len(prompt) + answer]


@dataclass
class Stage:
    """One stage with what the runner does for its machine: KV, kept outputs, and what of them is valid."""

    machine: StageSession
    kv: list[int] = field(default_factory=list)
    log: list[int] = field(default_factory=list)
    """Outputs of positions [0, ...)."""
    filled: int = 0
    output: fsm.StepComputed = field(default_factory=lambda: fsm.StepComputed(None))
    """What the step that computes will give."""
    freed: int = 0

    def compute(self, step: StageStep) -> None:
        """Compute as soon as the step begins. What was computed behind it becomes invalid."""
        ids = [] if step.data is None else step.data[1][step.start - step.data[0] :][: step.tokens]
        state = self.kv[step.start - 1] if step.start else 0
        rows = []
        for value in ids or step.ids:
            state = mixed(state, value)
            rows.append(state)
        assert len(rows) == step.tokens
        if step.kind is StepKind.REFILL:
            assert self.kv[step.start : step.end] == rows
            self.output = fsm.StepComputed([])
            return
        self.kv[step.start :] = rows
        tokens: tuple[int, ...] = ()
        for index, row in enumerate(rows[step.tokens - step.sample :] if self.machine.last else ()):
            tokens += (sampled(row),)
            if tokens[-1:] != step.ids[index + 1 : index + 2] or step.sampled_from + index + 1 == self.machine.max_tokens:
                break
        ends = bool(tokens) and step.sampled_from + len(tokens) == self.machine.max_tokens
        self.output = fsm.StepComputed(rows, tokens, ends)


@dataclass
class Chain:
    """A session's stages, its coordinator, and the lanes between them."""

    dice: random.Random
    prompt: list[int]
    answer: int
    truth: list[int]
    window: int
    """How many answer tokens the coordinator allows beyond those that have arrived."""
    stages: list[Stage] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    lanes: dict[tuple[int, int, Lane], deque[tuple[int, fsm.Event]]] = field(default_factory=dict)
    """(from, to, lane) -> (stage, event) in order."""
    slow: int | None = None
    """A stage that begins a step only if nothing else can happen: its peer computes for other sessions."""

    def open(self, stages: int) -> None:
        """Start the first epoch."""
        known = len(self.prompt)
        self.stages = [Stage(self._machine(stage, stages, known, StageState.IDLE)) for stage in range(stages)]
        self._send_prompt(0)

    def _machine(self, stage: int, stages: int, known: int, state: StageState) -> StageSession:
        return StageSession(
            prompt_tokens=len(self.prompt),
            known_tokens=known,
            max_tokens=len(self.prompt) + self.answer,
            token_credit=len(self.tokens) + self.window,
            first=stage == 0,
            last=stage == stages - 1,
            state=state,
            chunk_tokens=self.dice.randint(1, 9),
        )

    def _send_prompt(self, start: int) -> None:
        """Send the known tokens in one to four steps."""
        ids = [*self.prompt, *self.tokens]
        borders = sorted({start, len(ids), *(self.dice.randint(start, len(ids)) for _ in range(self.dice.randint(0, 3)))})
        for seq, (begin, end) in enumerate(pairwise(borders)):
            step = StageStep(begin, end - begin, StepKind.PREFILL, int(end == len(ids)), end, seq, data=(begin, ids[begin:end]))
            self.send(COORDINATOR, 0, step.kind.lane, fsm.StepArrived(step))
            if self.dice.random() < 0.2:
                self.send(COORDINATOR, 0, step.kind.lane, fsm.StepArrived(step))  # a repeat

    def next_epoch(self) -> None:
        """Lose all that is on its way, and resume each stage at a random position of those that it has."""
        known, stages = len(self.prompt) + len(self.tokens), self.stages
        for stage in stages:
            if stage.machine.state is StageState.COMPUTING:
                stage.machine.handle(fsm.StageEnded("a test"))
                stage.machine.handle(fsm.StepComputed(None))
        self.lanes.clear()
        starts = [
            self.dice.choice([0, min(stage.filled, known - 1), self.dice.randint(0, min(stage.filled, known - 1))])
            for stage in stages
        ]
        for index, stage in enumerate(stages):
            machine = self._machine(index, len(stages), known, StageState.OPEN)
            del stage.log[stage.filled :]
            machine.held, machine.kept_to = stage.filled, len(stage.log)
            stage.machine = machine
        for index, start in enumerate(starts):
            send_from = starts[index + 1] if index + 1 < len(starts) else known - 1
            self.send(COORDINATOR, index, Lane.CONTROL, fsm.StageResumed(start, send_from))
        self._send_prompt(starts[0])

    def send(self, sender: int, to: int, lane: Lane, event: fsm.Event) -> None:
        self.lanes.setdefault((sender, to, lane), deque()).append((to, event))

    def handle(self, index: int, event: fsm.Event) -> None:
        """Pass an event to a stage and carry its commands out."""
        machine = self.stages[index].machine
        commands = machine.handle(event)
        machine.validate()
        for command in commands:
            self._execute(index, command)

    def _execute(self, index: int, command: fsm.Command) -> None:
        stage = self.stages[index]
        match command:
            case fsm.BeginAt(start):
                stage.filled = start
                del stage.kv[start:], stage.log[start:]
            case fsm.Truncate(start):
                assert stage.machine.committed >= stage.filled, "committed positions are never taken back"
                assert start >= stage.filled
                del stage.log[start:]
            case fsm.Acknowledge(next_seq, credit):
                if index:
                    self.send(index, index - 1, Lane.CONTROL, fsm.OutputAcknowledged(next_seq, credit))
            case fsm.Deliver(sent):
                self._deliver(index, sent)
            case fsm.DeliverTokens(tokens):
                arrived = fsm.TokensArrived(tokens.index, tokens.tokens)
                self.send(index, COORDINATOR, Lane.CONTROL, arrived)
                if not stage.machine.complete:
                    self.send(index, 0, Lane.CONTROL, arrived)
            case fsm.FreeKv():
                stage.freed += 1
            case _:
                raise AssertionError(command)

    def _deliver(self, index: int, sent: fsm.SentStep) -> None:
        step = sent.step
        rows: Any = sent.output
        if rows is None:
            rows = self.stages[index].log[step.start : step.end]
        rows, start = rows[sent.skip :], step.start + sent.skip
        ids = step.ids if step.kind is StepKind.VERIFY else ()
        following = replace(step, start=start, tokens=len(rows), seq=sent.seq, ids=ids, data=(start, rows))
        for _ in range(self.dice.choice([1, 1, 1, 2])):  # a step may be sent again
            self.send(index, index + 1, step.kind.lane, fsm.StepArrived(following))

    def act(self) -> bool:
        """Do one of the things that can happen now. Returns: False if nothing can."""
        actions: list[tuple[Callable[[Any], None], Any]] = [(self._arrive, key) for key, lane in self.lanes.items() if lane]
        for index, stage in enumerate(self.stages):
            if stage.machine.ready is not None:
                actions.append((self._begin, index))
            if stage.machine.computing is not None:
                actions.append((self._computed, index))
        if not actions:
            return False
        if self.dice.random() < 0.15:
            self.dice.choice([self._guess_ahead, self._hold, self._refill])()
            self.slow = self.dice.choice([self.slow, self.slow, None, *range(len(self.stages))])
        quick = [(action, argument) for action, argument in actions if action != self._begin or argument != self.slow]
        action, argument = self.dice.choice(quick or actions)
        action(argument)
        return True

    def _arrive(self, key: tuple[int, int, Lane]) -> None:
        to, event = self.lanes[key].popleft()
        if to == COORDINATOR:
            self._take(event)
        elif isinstance(event, fsm.TokensArrived):
            self.handle(0, replace(event, drafts=self.guesses(event.index + len(event.tokens))))
        else:
            self.handle(to, event)

    def _take(self, event: fsm.Event) -> None:
        assert isinstance(event, fsm.TokensArrived)
        assert event.index == len(self.tokens), "tokens come once and in order"
        self.tokens += event.tokens
        assert self.tokens == self.truth[: len(self.tokens)]
        self._grant(len(self.tokens) + self.window)

    def _grant(self, credit: int) -> None:
        for stage in {0, len(self.stages) - 1}:
            self.send(COORDINATOR, stage, Lane.CONTROL, fsm.TokensGranted(credit))

    def _hold(self) -> None:
        """Lower the credit for a while, as before a change of plan."""
        self._grant(len(self.tokens))
        self._grant(len(self.tokens) + self.window)

    def guesses(self, index: int) -> tuple[int, ...]:
        """Guess tokens from answer token `index` on: none, right, partly right, or any."""
        right = self.truth[index : index + self.dice.choice([0, 0, 1, 3, 8])]
        wrong = [self.dice.randrange(VOCAB) for _ in range(self.dice.choice([0, 0, 1, 4, 40]))]
        return tuple(right + wrong)[: self.window - 1]

    def _guess_ahead(self) -> None:
        machine = self.stages[0].machine
        if machine.state is not StageState.OPEN and machine.known_to > machine.known_tokens:
            self.handle(0, fsm.TokensGuessed(self.guesses(machine.due - machine.prompt_tokens)))

    def _refill(self) -> None:
        """Have a stage compute committed positions again that the stage before it keeps."""
        index = self.dice.randrange(len(self.stages))
        before = self.stages[index - 1]
        machine = before.machine
        busy = machine.state in (StageState.OPEN, StageState.ENDED) or machine.replaying or machine.send_from
        if not index or busy or machine.output.next_seq + 2 > machine.output.credit:  # one is for the step that is computing
            return
        end = min(before.filled, machine.sent_to, len(before.log))
        if end < 1 or len(self.stages[index].kv) < end:
            return
        start = self.dice.randrange(end)
        step = StageStep(start, end - start, StepKind.REFILL)
        self._deliver(index - 1, machine.output.add(step, before.log[start:end]))

    def _begin(self, index: int) -> None:
        stage = self.stages[index]
        ready = stage.machine.ready
        assert ready is not None
        divisible = not index and ready.kind is StepKind.PREFILL
        self.handle(index, fsm.StepBegun(self.dice.randint(1, ready.tokens) if divisible else ready.tokens))
        assert stage.machine.computing is not None
        stage.compute(stage.machine.computing)

    def _computed(self, index: int) -> None:
        stage = self.stages[index]
        step, rows = stage.machine.computing, stage.output.output
        assert step is not None
        assert isinstance(rows, list)
        if step.kind is not StepKind.REFILL:
            stage.filled = step.committed
            stage.log[step.start :] = rows
        self.handle(index, stage.output)

    def drain(self) -> None:
        """Let everything happen that still can after the end of the answer."""
        for _ in range(10_000):
            if not self.act():
                break
        assert self.tokens == self.truth, "nothing comes after the end"
        for stage in self.stages:
            machine = stage.machine
            assert machine.state is StageState.IDLE
            assert machine.input.begun == machine.input.next_seq

    def end(self) -> None:
        """Close all stages, perhaps while messages are on their way. Each frees its KV once, and nothing more happens."""
        for index in range(len(self.stages)):
            self.handle(index, fsm.StageEnded("closed"))
        for _ in range(10_000):
            if not self.act():
                break
        assert [stage.freed for stage in self.stages] == [1] * len(self.stages)


@given(
    seed=st.integers(0, 2**32),
    stages=st.integers(1, 3),
    prompt=st.integers(1, 20),
    answer=st.integers(1, 60),
    epochs=st.integers(1, 3),
    window=st.sampled_from([1, 2, 8, 64]),
)
def test_any_guesses_and_schedule_give_the_tokens_of_an_undisturbed_answer(
    seed: int, stages: int, prompt: int, answer: int, epochs: int, window: int
) -> None:
    dice = random.Random(seed)
    ids = [dice.randrange(VOCAB) for _ in range(prompt)]
    truth = undisturbed(ids, answer, stages)
    chain = Chain(dice, ids, answer, truth, window)
    chain.open(stages)
    for epoch in range(epochs):
        goal = answer if epoch + 1 == epochs else (answer - 1) * (epoch + 1) // epochs
        while len(chain.tokens) < goal:
            assert chain.act(), f"nothing can happen any more, with {len(chain.tokens)} of {goal} tokens"
        if epoch + 1 < epochs and len(chain.tokens) < answer:
            chain.next_epoch()
    if dice.random() < 0.8:
        chain.drain()
    chain.end()
