"""One answer's tokens, their text and their timing, as every reader sees them.

The text is made token by token whether anybody reads or not, so every reader, on this peer or on the next coordinator, sees the
same sequence of deltas.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from meshd.agents.placement.model_library import ModelText
from meshd.agents.service import Finished, TextDelta
from meshd.agents.session.journal.record import AnswerToken, SessionRecord
from meshd.agents.session.text import Assembler, StopMatcher
from meshd.types import FinishReason, ModelCard, TokenLogprobs


@dataclass(slots=True)
class AnswerOutput:
    """Owns what an answer has produced. `touch` wakes all who wait for a change."""

    record: SessionRecord
    card: ModelCard
    text: ModelText
    started: float
    first_token_at: float | None = None
    last_token_at: float = 0.0
    tokens: list[AnswerToken] = field(default_factory=list)
    deltas: list[TextDelta] = field(default_factory=list)
    finished: Finished | None = None
    _assembler: Assembler = field(init=False)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._assembler = Assembler(
            decoder=self.text.tokenizer.stream(after=self.record.prompt[-1] if self.record.prompt else None),
            vocabulary=self.text.tokenizer,
            stops=StopMatcher(self.record.stop),
            with_logprobs=self.record.sampling.logprobs is not None,
        )

    @property
    def stopped(self) -> bool:
        """The text has reached a stop string."""
        return self._assembler.stopped

    @property
    def ttft_s(self) -> float:
        """Time to the first token made here; 0 before it."""
        return self.first_token_at - self.started if self.first_token_at is not None else 0.0

    def tpot_s(self, made: int) -> float:
        """Mean time per token over the `made` tokens of this run; 0 before the second one."""
        if self.first_token_at is None or made < 2:
            return 0.0
        return (self.last_token_at - self.first_token_at) / (made - 1)

    def restart(self, now: float) -> None:
        """The answer runs again after a suspension: its times count from `now`."""
        self.started, self.first_token_at = now, None

    def restore(self) -> FinishReason | None:
        """Take over the record's tokens.

        Returns: how the answer ended, which the tokens show even if its coordinator was lost before it wrote that into the record.
        """
        for token, logprobs in self.record.tokens:
            self.tokens.append((token, logprobs))
            self.decode(token, logprobs, end_of_sequence=self._ends(token))
        if self.record.finish:
            return FinishReason(self.record.finish)
        if self.stopped:
            return FinishReason.STOP
        return self.finish_at(len(self.tokens) - 1, self.tokens[-1][0]) if self.tokens else None

    def finish_at(self, index: int, token: int) -> FinishReason | None:
        """Returns: why the answer ends with this token, by the same rule as its last stage's; None if it continues."""
        if self._ends(token):
            return FinishReason.STOP
        return FinishReason.LENGTH if index + 1 == self.record.max_tokens else None

    def _ends(self, token: int) -> bool:
        return token in self.card.end_of_sequence and not self.record.ignore_eos

    def add(self, token: int, logprobs: TokenLogprobs | None, now: float) -> None:
        """Append a token that was made just now; `decode` makes its text."""
        self.last_token_at = now
        if self.first_token_at is None:
            self.first_token_at = now
        self.tokens.append((token, logprobs))

    def decode(self, token: int, logprobs: TokenLogprobs | None, *, end_of_sequence: bool) -> None:
        """Append the text that this token makes certain. Nothing follows a stop string."""
        if self.stopped:
            return
        delta = self._assembler.push(token, logprobs, end_of_sequence=end_of_sequence)
        if delta is not None:
            self.deltas.append(delta)

    def finish(self, reason: FinishReason, made: int) -> None:
        """Complete the text. Only the first call has an effect. made: tokens of this run."""
        if self.finished is not None:
            return
        if (delta := self._assembler.finish()) is not None:
            self.deltas.append(delta)
        self.finished = Finished(
            reason=FinishReason.STOP if self.stopped else reason,
            prompt_tokens=len(self.record.prompt),
            completion_tokens=len(self.tokens),
            ttft_s=self.ttft_s,
            tpot_s=self.tpot_s(made),
        )

    def touch(self) -> None:
        """Wake all who wait for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def change(self) -> None:
        """Wait for the next `touch`."""
        await self._changed.wait()

    async def until(self, condition: Callable[[], object], within_s: float) -> None:
        """Wait until the condition holds, or the time is over. It is checked at each `touch`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not condition():
                    await self._changed.wait()
